# SPDX-License-Identifier: Apache-2.0
"""Functions of SGLang: which are taken over, through which hook, and where their calls go."""

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backend_functions import reference
from e2e import field_backend
from implementations import manager_of
from sglang.srt.layers.attention.linear import gdn_backend
from sglang.srt.layers.attention.linear.gdn_backend import GDNKernelDispatcher
from sglang.srt.layers.attention.linear.kernels import gdn_triton
from sglang.srt.layers.attention.linear.utils import LinearAttnKernelBackend
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import nn

from sglang_fl import compat
from sglang_fl.config import Settings
from sglang_fl.dispatch import (
    BackendImplKind,
    OpImpl,
    PolicyManager,
    SelectionPolicy,
    reset_global_policy,
    set_global_policy,
    with_preference,
)
from sglang_fl.dispatch.bridge import gated_delta_rule
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.function import FunctionSocket
from sglang_fl.dispatch.bridge.report import BindReport
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.dispatch.catalog import FUNCTIONS
from sglang_fl.dispatch.logger_manager import open_dispatch_log
from sglang_fl.dispatch.policy import overrides

H, HV, K, V = 2, 4, 8, 16
CHUNK, PACKED, UPDATE, PREFILL_CONV, UPDATE_CONV = FUNCTIONS


class Hybrid(nn.Module):
    """A model with layers of linear attention, and a parameter that gives it a dtype."""

    def __init__(self, gates: int = HV, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            RadixLinearAttention(layer, H, H, HV, K, K, V, A_log=torch.zeros(HV), dt_bias=torch.zeros(gates)) for layer in range(3)
        )
        self.embedding = nn.Parameter(torch.zeros(512, 64, dtype=dtype))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang's functions as they were; whoever else has them, here or in SGLang, gets them back."""
    PolicyManager.get_instance()._listeners.clear()
    own = {op: getattr(sys.modules[module], name) for op, (module, name) in FUNCTIONS.items()}
    made = GDNKernelDispatcher.__init__
    set_global_policy(SelectionPolicy())
    yield
    reset_global_policy()
    open_dispatch_log(None)
    HookRegistry.reset()
    GDNKernelDispatcher.__init__ = made  # type: ignore[method-assign]
    gated_delta_rule._watching.clear()
    for op, (module, name) in FUNCTIONS.items():
        for place in (sys.modules[module], gdn_triton, gdn_backend):
            if hasattr(place, name):
                setattr(place, name, own[op])
    assert overrides.active == 0


_alive: list[Binder] = []


def references() -> list[OpImpl]:
    return [OpImpl(op, "reference.torch", BackendImplKind.REFERENCE, getattr(reference, op), writes_inputs=False) for op in FUNCTIONS]


def bind(
    policy: SelectionPolicy | None = None, model: nn.Module | None = None, settings: Settings | None = None, **fns: Callable[..., Any]
) -> BindReport:
    """Bind a hybrid model's functions; ``fns`` are the reference, and flagos, which goes first, by default."""
    flagos = (OpImpl(op, "default.flagos", BackendImplKind.DEFAULT, fn, writes_inputs=False) for op, fn in fns.items())
    set_global_policy(policy or SelectionPolicy())
    binder = Binder(manager_of(*references(), *flagos))
    _alive.append(binder)
    return binder.bind(model or Hybrid(), Load(settings or Settings()))


def prefill(kernel: Any = None, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SGLang's own call of prefill: its result, its chunk states, and the pool behind it."""
    torch.manual_seed(3)
    tokens, pool = 70, torch.randn(4, HV, V, K)
    out, _, chunks = (kernel or gdn_triton.TritonGDNKernel()).extend(
        torch.randn(1, tokens, H, K),
        torch.randn(1, tokens, H, K),
        torch.randn(1, tokens, HV, V),
        -torch.rand(1, tokens, HV),
        torch.rand(1, tokens, HV),
        ssm_states=pool,
        cache_indices=torch.tensor([2, 0]),
        query_start_loc=torch.tensor([0, 66, 70]),
        **changes,
    )
    return out, chunks, pool


def decode() -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's own call of decode: its result, and the pool behind it."""
    torch.manual_seed(4)
    pool = torch.randn(4, HV, V, K)
    out = gdn_triton.TritonGDNKernel().packed_decode(
        torch.randn(3, 2 * H * K + HV * V),
        torch.randn(3, HV),
        torch.randn(3, HV),
        A_log=torch.randn(HV),
        dt_bias=torch.randn(HV),
        scale=K**-0.5,
        ssm_states=pool,
        cache_indices=torch.tensor([3, -1, 1]),
        num_v_heads=HV,
        head_v_dim=V,
    )
    return out, pool


def verify() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SGLang's own call to verify drafts: its result, the pool, and the state after each draft."""
    torch.manual_seed(5)
    pool, states = torch.randn(4, HV, V, K), torch.zeros(3, 2, HV, V, K)
    out = gdn_triton.TritonGDNKernel().target_verify(
        torch.randn(HV),
        torch.randn(HV),
        *(torch.randn(1, 4, H, K), torch.randn(1, 4, H, K), torch.randn(1, 4, HV, V)),
        *(torch.randn(4, HV), torch.randn(4, HV)),
        ssm_states=pool,
        cache_indices=torch.tensor([3, 1]),
        query_start_loc=torch.tensor([0, 2, 4]),
        intermediate_states_buffer=states,
        intermediate_state_indices=torch.tensor([2, 0]),
        cache_steps=2,
        retrieve_parent_token=None,
    )
    return out, pool, states


def untouched() -> bool:
    return not HookRegistry._hooks and not hasattr(gdn_triton.fused_recurrent_gated_delta_rule_packed_decode, "__wrapped__")


def test_the_installed_sglang_has_the_functions() -> None:
    assert compat.gated_delta_rule_problems() == ()


def test_sglangs_calls_run_on_the_reference(tmp_path: Path) -> None:
    open_dispatch_log(str(tmp_path / "log"))
    report = bind()
    assert report.functions == {
        (CHUNK, CHUNK): "reference(reference.torch)",
        (PACKED, PACKED): "reference(reference.torch)",
        (UPDATE, UPDATE): "reference(reference.torch)",
    }
    out, chunks, pool = prefill()
    assert out.shape == (1, 70, HV, V) and chunks.shape == (1, 3, HV, V, K)
    decoded, after = decode()
    assert decoded.shape == (1, 3, HV, V) and not decoded[0, 1].any() and decoded[0, 0].any()
    torch.manual_seed(3)
    before = torch.randn(4, HV, V, K)
    assert [not torch.equal(a, b) for a, b in zip(pool, before, strict=True)] == [True, False, True, False]
    assert torch.equal(chunks[0, 0], before[2]), "before the first chunk stands the initial state"
    told = {line.removeprefix("[OOT-DISPATCH] ") for line in (tmp_path / "log").read_text().splitlines()}
    assert told == {
        f"{CHUNK} → reference(reference.torch)",
        f"{PACKED} → reference(reference.torch)",
    }
    assert f"  {CHUNK} → reference(reference.torch)" in report.summary()
    assert after.shape == pool.shape


def test_functions_with_flagos_parameters_and_results() -> None:
    """``(o, None, h)`` and ``head_first`` in prefill; in decode, parameters that cannot be read."""
    fns = {CHUNK: field_backend.chunk_gated_delta_rule, PACKED: field_backend.fused_recurrent_gated_delta_rule_packed_decode}
    report = bind(**fns)
    assert report.functions[CHUNK, CHUNK] == report.functions[PACKED, PACKED] == "flagos(default.flagos)"
    got = *prefill(), *decode()
    set_global_policy(SelectionPolicy("reference"))
    assert all(torch.equal(x, y) for x, y in zip(got, (*prefill(), *decode()), strict=True))


def test_without_an_update_the_pool_is_only_read() -> None:
    bind()
    out, _, pool = prefill(inplace_update=False)
    torch.manual_seed(3)
    assert torch.equal(pool, torch.randn(4, HV, V, K)) and torch.equal(out, prefill()[0])


@pytest.mark.parametrize(
    ("policy", "settings", "why"),
    [
        (SelectionPolicy(per_op_order=tuple((op, ("sglang",)) for op in FUNCTIONS)), Settings(), "policy"),
        (SelectionPolicy(), Settings(oot_enabled=False), "Layer 2 is off"),
        (SelectionPolicy(), Settings(oot_whitelist=("RMSNorm",)), "not in oot_whitelist"),
        (SelectionPolicy(), Settings(oot_blacklist=tuple(FUNCTIONS)), "oot_blacklist"),
    ],
)
def test_what_stays_with_sglang_has_no_hook(policy: SelectionPolicy, settings: Settings, why: str) -> None:
    report = bind(policy, settings=settings)
    assert report.functions[CHUNK, CHUNK] == report.functions[PACKED, PACKED] == f"sglang({why})"
    assert untouched()


def test_one_function_can_stay() -> None:
    report = bind(settings=Settings(oot_blacklist=(PACKED,)))
    assert report.functions[PACKED, PACKED] == "sglang(oot_blacklist)"
    assert report.functions[CHUNK, CHUNK] == "reference(reference.torch)"
    assert not hasattr(gdn_triton.fused_recurrent_gated_delta_rule_packed_decode, "__wrapped__")


@pytest.mark.parametrize("model", [Hybrid(gates=HV * K), nn.Linear(2, 2)], ids=["Kimi's gates", "no such layer"])
def test_a_model_that_does_not_call_them_changes_nothing(model: nn.Module) -> None:
    assert bind(model=model).functions == {}
    assert untouched()


def spoiled(op: str, spoil: Callable[..., None]) -> Callable[..., Any]:
    """The reference, with something done to its result and to the pool."""

    def fn(*args: Any) -> Any:
        result = getattr(reference, op)(*args)
        spoil(result, args[6])
        return result

    return fn


def raises(*args: Any) -> Any:
    raise ArithmeticError("this kernel is broken")


SPOILED: list[tuple[str, Callable[..., Any], str]] = [
    (CHUNK, raises, "this kernel is broken"),
    (CHUNK, spoiled(CHUNK, lambda result, pool: result[0].fill_(torch.nan)), "contains inf or nan"),
    (CHUNK, spoiled(CHUNK, lambda result, pool: pool[1].zero_()), r"the slots of the sequences are \[0, 2\]; it wrote \[0, 1, 2\]"),
    (CHUNK, lambda *args: reference.chunk_gated_delta_rule(*args)[0], "not .o, chunk states."),
    (CHUNK, lambda *args: reference.chunk_gated_delta_rule(*args[:10], False), r"it wrote \[\]"),
    (PACKED, spoiled(PACKED, lambda result, pool: result[0].fill_(1)), "not zero for a sequence that is padding"),
    (PACKED, spoiled(PACKED, lambda result, pool: pool[2].fill_(torch.inf)), "a state contains inf or nan"),
    (
        PACKED,
        lambda *args: tuple(x.clone() for x in reference.fused_recurrent_gated_delta_rule_packed_decode(*args)),
        "not out that it was",
    ),
]


@pytest.mark.parametrize(("op", "fn", "told"), SPOILED, ids=[told for *_, told in SPOILED])
def test_one_that_fails_its_trial_is_passed_over(op: str, fn: Callable[..., Any], told: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError, match=f"{op}: default.flagos failed its trial on {op}.*{told}"):
        bind(SelectionPolicy(strict=True), **{op: fn})
    assert untouched()
    report = bind(**{op: fn})
    assert report.functions[op, op] == "reference(reference.torch)"
    assert f"{op}: default.flagos failed its trial on {op}" in caplog.text and "reference.torch is used instead" in caplog.text


def broken_in_serving(op: str) -> tuple[Callable[..., Any], list[int]]:
    """The reference, which raises from its second call on; the first is its trial."""
    calls: list[int] = []

    def fn(*args: Any) -> Any:
        calls.append(1)
        return raises() if len(calls) > 1 else getattr(reference, op)(*args)

    return fn, calls


def test_one_that_raises_in_serving_gives_way_to_the_next() -> None:
    fn, calls = broken_in_serving(CHUNK)
    assert bind(**{CHUNK: fn}).functions[CHUNK, CHUNK] == "flagos(default.flagos)"
    out, chunks, _ = prefill()
    assert len(calls) == 2 and out.isfinite().all() and chunks.shape == (1, 3, HV, V, K)


def test_under_strict_its_error_goes_up() -> None:
    fn, _ = broken_in_serving(PACKED)
    bind(SelectionPolicy(strict=True), **{PACKED: fn})
    with pytest.raises(ArithmeticError, match="this kernel is broken"):
        decode()


def sglangs_is_recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """SGLang's function for prefill, which needs a GPU, gives its arguments away instead of running."""
    module, name = FUNCTIONS[CHUNK]
    given: list[tuple[Any, ...]] = []

    @functools.wraps(getattr(sys.modules[module], name))
    def sglangs(*args: Any, **named: Any) -> Any:
        given.append(args)
        return "o", None, "h"

    monkeypatch.setattr(sys.modules[module], name, sglangs)
    monkeypatch.setattr(gdn_triton, name, sglangs)
    return given


def test_the_word_sglang_behind_it_means_sglangs_function(monkeypatch: pytest.MonkeyPatch) -> None:
    given = sglangs_is_recorded(monkeypatch)
    fn, _ = broken_in_serving(CHUNK)
    bind(SelectionPolicy(per_op_order=((CHUNK, ("flagos", "sglang")),)), **{CHUNK: fn})
    assert prefill()[:2] == ("o", "h")
    _, _, _, _, _, scale, pool, slots, ends, *flags = given[0]
    assert scale is None and len(pool) == 4 and slots.tolist() == [2, 0] and ends.tolist() == [0, 66, 70]
    assert flags == [False, True, True], "head_first, use_qk_l2norm_in_kernel, inplace_update"


def test_a_dtype_that_the_implementation_does_not_take_goes_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    sglangs_is_recorded(monkeypatch)
    fn, only = reference.chunk_gated_delta_rule, frozenset({torch.bfloat16})
    binder = Binder(manager_of(OpImpl(CHUNK, "reference.torch", BackendImplKind.REFERENCE, fn, supported_dtypes=only)))
    report = binder.bind(Hybrid(dtype=torch.bfloat16), Load())
    assert report.functions[CHUNK, CHUNK] == "reference(reference.torch)"
    assert prefill()[0] == "o", "an fp32 call in a bf16 model"


def test_a_change_of_policy_reaches_a_function_that_is_hooked() -> None:
    ran: list[str] = []

    def flagos(*args: Any) -> Any:
        ran.append("flagos")
        return reference.chunk_gated_delta_rule(*args)

    bind(**{CHUNK: flagos})
    ran.clear()
    prefill()
    with with_preference("reference"):
        prefill()
    assert ran == ["flagos"]
    set_global_policy(SelectionPolicy("reference"))
    prefill()
    assert ran == ["flagos"]
    reset_global_policy()
    set_global_policy(SelectionPolicy())
    prefill()
    assert ran == ["flagos"] * 2


def test_a_context_reaches_a_function_that_the_policy_leaves_to_sglang() -> None:
    bind(SelectionPolicy(per_op_order=tuple((op, ("sglang",)) for op in FUNCTIONS)))
    assert untouched()
    with with_preference("reference"):
        out, *_ = prefill()
    assert out.isfinite().all()
    hook = gdn_triton.chunk_gated_delta_rule
    assert hook is not hook.__wrapped__, "the hook stays, and hands on"
    with pytest.raises(Exception, match=r"."):
        prefill()  # SGLang's Triton kernel, which has no device here


def test_another_plugins_hook_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    HookRegistry.register(".".join(FUNCTIONS[CHUNK]), lambda own, *args, **kwargs: "theirs", HookType.AROUND)
    HookRegistry.apply_hooks()
    with pytest.raises(RuntimeError, match=f"{CHUNK} stays with SGLang: another plugin hooks it already"):
        bind(SelectionPolicy(strict=True))
    report = bind()
    assert report.functions[CHUNK, CHUNK].startswith("sglang(another plugin hooks it already")
    _alive[-1].refresh()
    assert caplog.text.count("stays with SGLang: another plugin") == 1
    assert gdn_triton.chunk_gated_delta_rule() == "theirs"


def test_a_kernel_class_that_does_not_call_it_is_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    open_dispatch_log(str(tmp_path / "log"))
    bind()
    caplog.set_level(logging.INFO)
    triton = LinearAttnKernelBackend.TRITON
    triton_kernel = GDNKernelDispatcher(triton, triton).decode_kernel
    assert "does not call" not in caplog.text

    class FlashInferGDNKernel:
        pass

    gated_delta_rule._dispatcher_made(
        None, SimpleNamespace(extend_kernel=FlashInferGDNKernel(), decode_kernel=triton_kernel, verify_kernel=triton_kernel)
    )
    assert "sglang-fl: SGLang runs FlashInferGDNKernel, which does not call chunk_gated_delta_rule" in caplog.text
    assert f"{CHUNK} → sglang(not called: FlashInferGDNKernel is used)" in (tmp_path / "log").read_text()
    assert PACKED not in (tmp_path / "log").read_text()


def test_a_refresh_that_stops_changes_nothing() -> None:
    """A strict policy moves two functions; the hook on the second is taken by another plugin."""
    HookRegistry.register(".".join(FUNCTIONS[PACKED]), lambda own, *args, **kwargs: "theirs", HookType.AROUND)
    HookRegistry.apply_hooks()
    bind(SelectionPolicy(per_op_order=tuple((op, ("sglang",)) for op in FUNCTIONS)))
    binder = _alive[-1]
    chunk = next(socket for socket in binder._sockets.values() if socket.op == CHUNK)
    PolicyManager.get_instance()._global = SelectionPolicy(strict=True)
    with pytest.raises(RuntimeError, match=f"{PACKED} stays with SGLang"):
        binder.refresh()
    assert isinstance(chunk, FunctionSocket) and chunk.hook.forward is None


def test_a_model_loaded_with_other_settings_decides_anew() -> None:
    binder = Binder(manager_of(*references()))
    assert binder.bind(Hybrid(), Load()).functions[CHUNK, CHUNK] == "reference(reference.torch)"
    report = binder.bind(Hybrid(), Load(Settings(oot_blacklist=(CHUNK,))))
    assert report.functions[CHUNK, CHUNK] == "sglang(oot_blacklist)"
    assert report.functions[PACKED, PACKED] == "reference(reference.torch)"
    with pytest.raises(Exception, match=r"."):
        prefill()  # SGLang's Triton kernel, which has no device here
    assert binder.bind(Hybrid(), Load(deterministic=True)).functions[PACKED, PACKED] == "sglang(deterministic mode)"


def test_a_function_of_another_sglang_stays_with_it_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = f"{':'.join(FUNCTIONS[PACKED])} is missing"
    monkeypatch.setattr(gated_delta_rule, "gated_delta_rule_problems", lambda: (problem,))
    report = bind()
    assert report.functions[PACKED, PACKED] == f"sglang(SGLang differs from what sglang-fl needs: {problem})"
    assert report.functions[CHUNK, CHUNK] == "reference(reference.torch)"


def test_if_what_they_share_differs_all_functions_stay_with_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_delta_rule, "gated_delta_rule_problems", lambda: ("sglang.srt.configs.mamba_utils:f is missing",))
    why = "sglang(SGLang differs from what sglang-fl needs: sglang.srt.configs.mamba_utils:f is missing)"
    assert set(bind().functions.values()) == {why}
    assert untouched()


def test_a_model_that_cannot_be_bound_leaves_no_mark() -> None:
    """Under strict, an implementation fails its trial on the second model's dtype; the first is served as before."""

    def no_bf16(*args: Any) -> Any:
        if args[0].dtype is torch.bfloat16:
            raise ArithmeticError("no bf16")
        return reference.chunk_gated_delta_rule(*args)

    bind(**{CHUNK: no_bf16})
    binder = _alive[-1]
    (chunk,) = (socket for socket in binder._sockets.values() if socket.op == CHUNK)
    set_global_policy(SelectionPolicy(strict=True))
    with pytest.raises(RuntimeError, match="no bf16"):
        binder.bind(Hybrid(dtype=torch.bfloat16), Load())
    assert next(socket for socket in binder._sockets.values() if socket.op == CHUNK) is chunk and chunk.dtype is torch.float32
    set_global_policy(SelectionPolicy())
    set_global_policy(SelectionPolicy(strict=True))
    assert prefill()[0].isfinite().all()


def test_drafts_are_verified_on_the_reference() -> None:
    """The pool is not updated. The states after drafts are those after decoding them one by one."""
    bind()
    out, pool, states = verify()
    torch.manual_seed(5)
    assert torch.equal(pool, torch.randn(4, HV, V, K))
    assert out.shape == (1, 4, HV, V) and out.isfinite().all()
    assert not states[1].any() and states[2].any() and states[0].any() and not torch.equal(states[2, 0], states[2, 1])


def test_the_gates_of_another_attention_go_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = FUNCTIONS[UPDATE]

    @functools.wraps(getattr(sys.modules[module], name))
    def sglangs(*args: Any, **named: Any) -> Any:
        return named

    monkeypatch.setattr(sys.modules[module], name, sglangs)
    monkeypatch.setattr(gdn_triton, name, sglangs)
    bind()
    x = torch.zeros(1, 1, H, K)
    call = functools.partial(getattr(gdn_triton, name), *[x] * 3, 1.0, 20.0, *[x] * 6)
    for argument in ({"is_kda": True}, {"lower_bound": -5.0}, {"cache_ring": True}):
        assert call(**argument) == argument


def convolved(width: int = 4) -> Hybrid:
    model = Hybrid()
    for layer in model.layers:
        layer.conv_weights = torch.zeros(6, width)
    return model


def test_convolutions_run_on_the_reference() -> None:
    """A whole sequence gives the same as its first part followed by single tokens."""
    report = bind(model=convolved())
    assert report.functions[PREFILL_CONV, PREFILL_CONV] == report.functions[UPDATE_CONV, UPDATE_CONV] == "reference(reference.torch)"
    torch.manual_seed(6)
    x, weight, bias, slot = torch.randn(6, 7), torch.randn(6, 4), torch.randn(6), torch.tensor([1])
    whole = gdn_backend.causal_conv1d_fn(x, weight, bias, torch.zeros(2, 6, 3), torch.tensor([0, 7]), [7], slot, activation="swish")
    pool = torch.zeros(2, 6, 3)
    parts = [gdn_backend.causal_conv1d_fn(x[:, :5], weight, bias, pool, torch.tensor([0, 5]), [5], slot)]
    for token in (5, 6):
        parts.append(gdn_backend.causal_conv1d_update(x[:, token][None], pool, weight, bias, "silu", conv_state_indices=slot).T)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(pool[1], x[:, 4:])
    assert not pool[0].any()


@pytest.mark.parametrize("op", [PREFILL_CONV, UPDATE_CONV])
def test_a_convolution_that_touches_another_slot_is_passed_over(op: str) -> None:
    def fn(*args: Any) -> Any:
        pool = args[3] if op == PREFILL_CONV else args[1]
        result = getattr(reference, op)(*args)
        pool[1] += 1
        return result

    with pytest.raises(RuntimeError, match=rf"{op}: default.flagos failed its trial on {op}.*it wrote \[0, 1, 2\]"):
        bind(SelectionPolicy(strict=True), model=convolved(), **{op: fn})
    assert bind(model=convolved(), **{op: fn}).functions[op, op] == "reference(reference.torch)"
