# SPDX-License-Identifier: Apache-2.0
"""Binding: who is bound, what SGLang's special paths still do, and how policy changes reach bound layers."""

import asyncio
import copy
import gc
import logging
import pkgutil
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from implementations import manager_of, unchanged
from sglang.kernels import fused_op
from sglang.kernels.spec import KernelBackend
from torch import nn

from sglang_fl.config import Settings
from sglang_fl.dispatch import (
    BackendImplKind,
    OpImpl,
    OpManager,
    PolicyManager,
    SelectionPolicy,
    get_default_manager,
    policy_context,
    reset_global_policy,
    set_global_policy,
    with_preference,
)
from sglang_fl.dispatch.bridge.base import ModelContext
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.bridges import LAYER_BRIDGES
from sglang_fl.dispatch.bridge.layer import layer_sockets
from sglang_fl.dispatch.bridge.report import BindReport
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.dispatch.logger_manager import open_dispatch_log
from sglang_fl.dispatch.policy import overrides

from .sglang_layers import HIDDEN, Model, rotary, sglang_class

D, R, V = BackendImplKind.DEFAULT, BackendImplKind.REFERENCE, BackendImplKind.VENDOR
X = torch.ones(2, HIDDEN)


def norm_that_says(number: float) -> Callable[..., Any]:
    """An rms_norm whose result tells which implementation ran."""

    def fn(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return unchanged(layer, torch.full_like(x, number), residual)

    return fn


def fails(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    raise ArithmeticError("this kernel is broken")


FLAGOS, VENDOR, REFERENCE = 1.0, 2.0, 3.0


def manager(**functions: Callable[..., Any] | None) -> OpManager:
    """rms_norm on flagos, vendor and reference; a None leaves one out."""
    rows = (("flagos", "default.flagos", D, FLAGOS), ("vendor", "vendor.x", V, VENDOR), ("reference", "reference.torch", R, REFERENCE))
    given = [(impl_id, kind, functions.get(word, norm_that_says(number))) for word, impl_id, kind, number in rows]
    return manager_of(*(rms_norm(impl_id, kind, fn, writes_inputs=False) for impl_id, kind, fn in given if fn is not None))


def rms_norm(impl_id: str, kind: BackendImplKind, fn: Callable[..., Any], **more: Any) -> OpImpl:
    return OpImpl("rms_norm", impl_id, kind, fn, vendor="x" if kind is V else None, **more)


def order(*tokens: str, strict: bool = False) -> SelectionPolicy:
    return SelectionPolicy(strict=strict, per_op_order=(("rms_norm", tokens),))


def norm(**options: Any) -> Any:
    return sglang_class("RMSNorm")(HIDDEN, **options)


def ran(layer: Any) -> float | str:
    """Which implementation a call of the layer runs."""
    value = layer(X.clone())[0, 0].item()
    return "sglang" if abs(value - 1) < 1e-5 and value != FLAGOS else value


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    _alive.clear()
    PolicyManager.get_instance()._listeners.clear()  # binders of earlier tests, until they are collected
    set_global_policy(SelectionPolicy())
    open_dispatch_log(None)
    yield
    reset_global_policy()
    open_dispatch_log(None)
    fused_op.set_fused_op_backend(None)
    fused_op.disable_fused_op_trace()
    fused_op.clear_fused_op_trace()
    assert overrides.active == 0


def bound(policy: SelectionPolicy | None = None, layer: Any = None, settings: Settings | None = None, **functions: Any) -> Any:
    set_global_policy(policy or SelectionPolicy())
    layer = layer if layer is not None else norm()
    bind(layer, manager(**functions), settings)
    return layer


_alive: list[Binder] = []


def bind(
    layer: nn.Module, manager: OpManager, settings: Settings | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> BindReport:
    binder = Binder(manager)
    _alive.append(binder)
    return binder.bind(Model(layer, dtype=dtype), Load(settings or Settings(), **options))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SelectionPolicy(), FLAGOS),
        (SelectionPolicy("vendor"), VENDOR),
        (SelectionPolicy("reference"), REFERENCE),
        (order("sglang"), "sglang"),
        (order("vendor:nobody", "sglang"), "sglang"),
        (order("vendor:nobody", "reference"), REFERENCE),
        (SelectionPolicy("vendor", deny_vendors=frozenset("x")), FLAGOS),
    ],
)
def test_a_layer_runs_on_what_the_policy_says(policy: SelectionPolicy, expected: float | str) -> None:
    layer = bound(policy)
    assert ran(layer) == expected


def test_a_layer_left_to_sglang_is_untouched() -> None:
    layer = bound(order("sglang"))
    assert layer._forward_method is None
    assert not any("fl" in name for name in vars(layer))


@pytest.mark.parametrize(
    ("settings", "expected", "why"),
    [
        (Settings(oot_blacklist=("RMSNorm",)), "sglang", "oot_blacklist"),
        (Settings(oot_blacklist=("SiluAndMul",)), FLAGOS, None),
        (Settings(oot_whitelist=("SiluAndMul",)), "sglang", "not in oot_whitelist"),
        (Settings(oot_whitelist=("RMSNorm",)), FLAGOS, None),
        (Settings(oot_whitelist=()), "sglang", "not in oot_whitelist"),
        (Settings(oot_enabled=False), "sglang", "Layer 2 is off"),
    ],
)
def test_lists_of_classes(settings: Settings, expected: float | str, why: str | None, tmp_path: Path) -> None:
    open_dispatch_log(str(tmp_path / "log"))
    layer = bound(settings=settings)
    assert ran(layer) == expected
    assert (tmp_path / "log").read_text() == f"[OOT-DISPATCH] RMSNorm → {f'sglang({why})' if why else 'flagos(default.flagos)'}\n"


def test_a_class_in_a_list_stands_for_its_subclasses() -> None:
    class Special(sglang_class("RMSNorm")):  # type: ignore[misc]
        pass

    layer = bound(layer=Special(HIDDEN), settings=Settings(oot_blacklist=("RMSNorm",)))
    assert ran(layer) == "sglang"
    layer = bound(layer=Special(HIDDEN))
    assert ran(layer) == FLAGOS


def test_the_summary_counts() -> None:
    set_global_policy(SelectionPolicy("reference"))
    shared = norm()
    model = Model(shared, norm(), nn.Sequential(shared), norm(fp32_residual=True), rotary("RotaryEmbedding"))
    report = Binder(manager()).bind(model, Load())
    assert report.bound == 2
    assert report.left == 2
    assert report.summary().splitlines()[0] == "sglang-fl: 2 layers bound, 2 left to SGLang"
    assert "RMSNorm" in report.summary() and "reference(reference.torch), 2 layers" in report.summary()
    assert "sglang(fp32_residual=True), 1 layer" in report.summary()
    assert "sglang(no implementation can run), 1 layer" in report.summary()


def test_supported_dtypes_are_honoured() -> None:
    flagos = rms_norm("default.flagos", D, norm_that_says(FLAGOS), supported_dtypes=frozenset({torch.bfloat16}))
    impls = manager_of(flagos, rms_norm("reference.torch", R, norm_that_says(REFERENCE)))
    for dtype, expected in ((torch.bfloat16, FLAGOS), (torch.float32, REFERENCE)):
        layer = norm()
        bind(layer, impls, dtype=dtype)
        assert layer(X.to(dtype))[0, 0].item() == expected


def wrong_shape(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return unchanged(layer, x[..., :1], residual)


def wrong_dtype(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return unchanged(layer, x.double(), residual)


def not_finite(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return unchanged(layer, x * float("nan"), residual)


def forgets_residual(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return x


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (fails, "ArithmeticError: this kernel is broken"),
        (wrong_shape, r"ValueError: its result has shape \(2, 1\), not \(2, 64\)"),
        (not_finite, "ValueError: its result contains inf or nan"),
        (wrong_dtype, r"torch.float64 on cpu, not torch.float32"),
        (forgets_residual, r"TypeError: with a residual its result is Tensor, not \(normed, residual\)"),
    ],
)
def test_what_fails_its_trial_is_passed_over_with_one_warning(broken: Any, told: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        set_global_policy(SelectionPolicy())
        layers = [norm(), norm()]
        binder = Binder(manager(flagos=broken))
        report = binder.bind(Model(*layers), Load())
    assert {ran(layer) for layer in layers} == {VENDOR}
    assert report.bound == 2
    assert len(caplog.records) == 1
    assert caplog.records[0].message.startswith("rms_norm: default.flagos failed its trial on RMSNorm: ")
    assert "vendor.x is used instead" in caplog.text
    assert re.search(told, caplog.text)


def test_under_strict_a_failed_trial_stops() -> None:
    with pytest.raises(
        RuntimeError, match=r"rms_norm: default\.flagos failed its trial on RMSNorm: ArithmeticError: this kernel is broken.*strict"
    ):
        bound(SelectionPolicy(strict=True), flagos=fails)


def test_under_strict_nothing_to_run_on_stops() -> None:
    with pytest.raises(
        RuntimeError, match=r"no implementation of rms_norm can run for RMSNorm \(order vendor:nobody: vendor:nobody: no backend"
    ):
        bound(order("vendor:nobody", strict=True))


def test_nothing_to_run_on_leaves_the_layer_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    layer = bound(order("vendor:nobody"))
    assert ran(layer) == "sglang"
    assert "no implementation of rms_norm can run" in caplog.text and "it stays with SGLang" in caplog.text


def test_the_trial_has_the_layers_real_size_and_dtype_and_leaves_random_numbers_alone() -> None:
    seen = []

    def fn(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        seen.append((tuple(x.shape), x.dtype, residual is not None))
        return unchanged(layer, x, residual)

    set_global_policy(SelectionPolicy())
    layers = [norm() for _ in range(30)]
    state = torch.random.get_rng_state()
    Binder(manager(flagos=fn)).bind(Model(*layers, dtype=torch.bfloat16), Load())
    assert torch.equal(state, torch.random.get_rng_state())
    assert seen == [((2, HIDDEN), torch.bfloat16, False), ((2, HIDDEN), torch.bfloat16, True)], "one trial speaks for all"


@pytest.mark.parametrize(
    ("attributes", "heads"),
    [({"num_heads": 40, "num_kv_heads": 10}, (40, 10)), ({"num_heads": 128, "num_local_heads": 64}, (64, 1)), ({}, (4, 2))],
)
def test_the_trial_of_a_rotary_embedding_has_the_attentions_heads(attributes: dict[str, int], heads: tuple[int, int]) -> None:
    """As each rank has them; those of latent attention share one key. 4 and 2 where nothing tells."""
    attention = nn.Module()
    attention.rotary_emb = rotary("RotaryEmbedding", head=64, rotary_dim=64)
    vars(attention).update(attributes)
    (socket,) = layer_sockets(Model(attention), LAYER_BRIDGES, Load())
    seen = []

    def fn(layer: Any, query: torch.Tensor, key: torch.Tensor, *more: Any) -> Any:
        seen.append((query.shape[1], key.shape[1]))
        return query, key

    socket.trial(fn)
    assert seen == [heads]


def test_the_width_of_a_gated_mlp_comes_from_its_first_matrix() -> None:
    mlp = nn.Module()
    mlp.gate_up_proj = nn.Module()
    mlp.gate_up_proj.output_size_per_partition = 96
    mlp.act_fn = sglang_class("SiluAndMul")()
    assert [socket.context for socket in layer_sockets(Model(mlp), LAYER_BRIDGES, Load())] == [
        ModelContext(torch.float32, torch.device("cpu"), 48)
    ]


@pytest.mark.parametrize("enabled", [True, False])
def test_an_activation_that_sglang_fuses_with_fp8_quantisation_stays_its_own(enabled: bool) -> None:
    """Bound, it would be computed alone, and quantised in a second kernel."""
    from sglang.srt.layers.quantization.fp8_activation import DenseSiluAndMulQuant

    mlp = nn.Module()
    mlp.act_fn = sglang_class("SiluAndMul")()
    mlp.activation_quant = DenseSiluAndMulQuant.__new__(DenseSiluAndMulQuant)  # which asks for Blackwell
    mlp.activation_quant.enabled = enabled
    report = Binder(get_default_manager()).bind(Model(mlp), Load())
    assert report.bound == (not enabled)
    assert ("SGLang fuses it with the FP8 quantisation that follows" in report.summary()) is enabled
    for model in ("llama", "qwen2"):
        source = Path(pkgutil.resolve_name("sglang").__path__[0], "srt", "models", f"{model}.py").read_text()
        assert "self.activation_quant = DenseSiluAndMulQuant(self.down_proj)" in source


def test_a_pinned_layer_stays_pinned() -> None:
    layer = norm(force_native=True)
    before = layer._forward_method
    layer = bound(layer=layer)
    assert layer._forward_method == before == layer.forward_native


def test_pinned_and_compiled_layers_are_left_alone_after_a_context_that_gave_a_layer_back() -> None:
    """SGLang's own forward, which such a context runs, is not taken for one of ours."""
    layer = bound()
    with policy_context(order("sglang")):
        assert ran(layer) == "sglang"
    pinned = norm(force_native=True)
    assert "SGLang pinned it" in _alive[-1].bind(Model(pinned), Load()).summary()
    layer.enter_torch_compile(num_tokens=1)
    set_global_policy(SelectionPolicy("vendor"))
    assert layer._forward_method == layer.forward_native


def test_torch_compile_mode_and_back() -> None:
    layer = bound()
    layer.enter_torch_compile(num_tokens=1)
    assert ran(layer) == "sglang"
    set_global_policy(SelectionPolicy("vendor"))
    assert layer._forward_method == layer.forward_native, "a policy change leaves the compile-safe forward in place"
    layer.leave_torch_compile()
    assert ran(layer) == VENDOR


def test_torch_compile_mode_entered_before_the_first_call() -> None:
    layer = bound()
    layer.enter_torch_compile(num_tokens=1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X.clone()), layer.forward_native(X))
    layer.leave_torch_compile()
    assert ran(layer) == FLAGOS


def test_a_bound_layer_can_be_compiled_as_it_is() -> None:
    """Layers whose class keeps its forward under torch.compile are traced through the binding."""
    layer = bound()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert compiled(X.clone())[0, 0].item() == FLAGOS


def test_a_bound_rotary_embedding_can_be_compiled_as_it_is() -> None:
    def plus(obj: Any, query: Any, key: Any, cos: Any, sin: Any, position_ids: Any, rotary_interleaved: Any = 0, inplace: Any = 0) -> Any:
        return query + 1, key + 2

    layer: Any = rotary("RotaryEmbedding")
    bind(layer, manager_of(OpImpl("rotary_embedding", "default.flagos", D, plus)))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    query, positions = torch.zeros(3, 128), torch.arange(3)
    got = compiled(positions, query, query)
    assert (got[0].sum().item(), got[1].sum().item()) == (384, 768)


def test_a_forced_backend_goes_past_the_binding() -> None:
    layer = bound()
    fused_op.set_fused_op_backend(KernelBackend.TORCH)
    assert ran(layer) == "sglang"
    fused_op.set_fused_op_backend(None)
    assert ran(layer) == FLAGOS
    assert layer(X.clone(), backend=KernelBackend.TORCH)[0, 0].item() == pytest.approx(1.0)


def test_tracing_names_the_implementation() -> None:
    layer = bound()
    fused_op.enable_fused_op_trace()
    layer(X.clone())
    layer(X.clone())
    assert [record.backend for record in fused_op.get_fused_op_trace()] == ["default.flagos", "default.flagos"]


def test_deterministic_mode_takes_only_what_is_batch_invariant() -> None:
    set_global_policy(SelectionPolicy())
    impls, layer, other = manager(), norm(), norm()
    report = bind(layer, impls, deterministic=True)
    assert ran(layer) == "sglang" and "sglang(deterministic mode)" in report.summary()
    impls.registry.register_impl(rms_norm("reference.exact", R, norm_that_says(9.0), batch_invariant=True))
    bind(other, impls, deterministic=True)
    assert ran(other) == 9.0


def test_a_copy_of_a_bound_layer_is_bound_to_itself() -> None:
    layer = bound(flagos=lambda layer, x, residual=None: (x * layer.weight[0], residual) if residual is not None else x * layer.weight[0])
    twin = copy.deepcopy(layer)
    twin.weight.data.fill_(5.0)
    assert twin(X.clone())[0, 0].item() == 5.0
    assert layer(X.clone())[0, 0].item() == 1.0
    with with_preference("vendor"):
        assert ran(twin) == VENDOR


def test_forward_hooks_keep_working() -> None:
    layer = bound()
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer(X.clone())
    assert seen == [1]


def test_a_global_change_takes_effect_and_back() -> None:
    layer = bound()
    seen = [ran(layer)]
    for policy in (SelectionPolicy("vendor"), order("sglang"), SelectionPolicy("reference"), SelectionPolicy()):
        set_global_policy(policy)
        seen += [ran(layer), ran(layer)]
    assert seen == [FLAGOS, VENDOR, VENDOR, "sglang", "sglang", REFERENCE, REFERENCE, FLAGOS, FLAGOS]


def test_a_policy_set_while_a_model_is_being_bound_is_followed() -> None:
    """The policy that binding started from may be another by the time the layers are known."""
    set_global_policy(SelectionPolicy())
    layer = norm()
    binder = Binder(manager())
    _alive.append(binder)
    with binder._lock:
        thread = threading.Thread(target=binder.bind, args=(Model(layer), Load()))
        thread.start()
        time.sleep(0.2)  # the thread waits for the lock now
        set_global_policy(SelectionPolicy("vendor"))
    thread.join()
    assert ran(layer) == VENDOR


def test_offloaded_weights_stay_with_sglang() -> None:
    layer = norm()
    layer.weight = nn.Parameter(torch.ones(HIDDEN, device="meta"))
    report = bind(layer, manager())
    assert "sglang(its weights are offloaded)" in report.summary()


def test_a_global_change_that_a_layer_cannot_follow_changes_nothing() -> None:
    layer = bound(vendor=fails)
    with pytest.raises(RuntimeError, match="failed its trial"):
        set_global_policy(SelectionPolicy("vendor", strict=True))
    assert ran(layer) == FLAGOS


def test_a_context_changes_bound_layers_and_layers_left_by_policy() -> None:
    for policy, outside in ((SelectionPolicy(), FLAGOS), (order("sglang"), "sglang")):
        layer = bound(policy)
        seen = [ran(layer)]
        with with_preference("vendor"):
            seen.append(ran(layer))
            with policy_context(order("sglang")):
                seen.append(ran(layer))
            seen.append(ran(layer))
        seen.append(ran(layer))
        assert seen == [outside, VENDOR, "sglang", VENDOR, outside]


def test_a_context_before_the_first_call() -> None:
    layer = bound(order("sglang"))
    with with_preference("vendor"):
        assert ran(layer) == VENDOR
    assert layer._forward_method is None
    assert ran(layer) == "sglang"


def test_another_thread_never_sees_a_context_of_this_one() -> None:
    layer = bound()
    inside, seen, release = threading.Event(), [], threading.Event()

    def other() -> None:
        inside.wait()
        seen.extend([ran(layer), ran(layer)])
        release.set()

    thread = threading.Thread(target=other)
    thread.start()
    with with_preference("vendor"):
        assert ran(layer) == VENDOR
        inside.set()
        release.wait()
        assert ran(layer) == VENDOR
    thread.join()
    assert seen == [FLAGOS, FLAGOS]


def test_tasks_see_their_own_contexts() -> None:
    layer = bound()

    async def look(prefer: str) -> list[float | str]:
        with with_preference(prefer):
            seen = []
            for _ in range(5):
                seen.append(ran(layer))
                await asyncio.sleep(0)
            return seen

    async def main() -> list[list[float | str]]:
        return await asyncio.gather(look("vendor"), look("reference"), look("flagos"))

    assert asyncio.run(main()) == [[VENDOR] * 5, [REFERENCE] * 5, [FLAGOS] * 5]
    assert ran(layer) == FLAGOS


def test_many_threads_and_changes_at_once() -> None:
    layer = bound()
    stop, errors = threading.Event(), []

    def calls(prefer: str, expected: float) -> None:
        while not stop.is_set():
            with with_preference(prefer):
                if ran(layer) != expected:
                    errors.append((prefer, expected))

    threads = [threading.Thread(target=calls, args=pair) for pair in (("vendor", VENDOR), ("reference", REFERENCE), ("flagos", FLAGOS))]
    for thread in threads:
        thread.start()
    for i in range(100):
        set_global_policy(SelectionPolicy(("vendor", "flagos", "reference")[i % 3]))
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    set_global_policy(SelectionPolicy("vendor"))
    assert ran(layer) == VENDOR


@pytest.mark.usefixtures("quick_collection")
@pytest.mark.parametrize("broken", [{}, {"flagos": fails}])
def test_a_forgotten_layer_can_be_collected(broken: dict[str, Any]) -> None:
    layer = bound(**broken)
    layer(X.clone())
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def breaks_later(word: str) -> Callable[..., Any]:
    """Passes its trial (four rows or fewer), fails on a larger batch."""

    def fn(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if x.shape[0] > 4:
            raise ArithmeticError(f"{word} cannot do {x.shape[0]} rows")
        return norm_that_says(FLAGOS)(layer, x, residual)

    return fn


def test_a_failure_while_serving_is_reported_and_retried_elsewhere(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    open_dispatch_log(str(tmp_path / "log"))
    layer = bound(flagos=breaks_later("flagos"))
    big = torch.ones(8, HIDDEN)
    with caplog.at_level(logging.ERROR):
        assert layer(big)[0, 0].item() == VENDOR
        assert layer(big)[0, 0].item() == VENDOR
    assert caplog.text.count("rms_norm: default.flagos raised ArithmeticError: flagos cannot do 8 rows") == 1
    assert "RMSNorm → vendor(vendor.x)" in (tmp_path / "log").read_text()


def test_a_failure_comes_to_sglang_where_the_order_says_so() -> None:
    layer = bound(order("flagos", "sglang"), flagos=breaks_later("flagos"))
    assert layer(torch.ones(8, HIDDEN))[0, 0].item() == pytest.approx(1.0)
    _, residual = layer(torch.ones(8, HIDDEN), torch.ones(8, HIDDEN))
    assert residual[0, 0].item() == 2.0


def test_a_retry_is_as_choosy_as_the_binding() -> None:
    """Neither what is not batch-invariant, nor what does not take the dtype, nor what failed its trial."""
    first = rms_norm("default.flagos", D, breaks_later("flagos"), writes_inputs=False, batch_invariant=True)
    other_dtype = rms_norm("vendor.x", V, norm_that_says(VENDOR), supported_dtypes=frozenset({torch.bfloat16}))
    for deterministic, others in (
        (True, [rms_norm("vendor.x", V, norm_that_says(VENDOR))]),
        (False, [other_dtype, rms_norm("vendor.y", V, wrong_shape)]),
    ):
        layer = norm()
        bind(layer, manager_of(first, *others), deterministic=deterministic)
        with pytest.raises(ArithmeticError, match="flagos cannot do 8 rows"):
            layer(torch.ones(8, HIDDEN))


def test_a_failure_goes_up_where_inputs_may_have_been_written() -> None:
    layer, reference = norm(), rms_norm("reference.torch", R, norm_that_says(REFERENCE))
    bind(layer, manager_of(rms_norm("default.flagos", D, breaks_later("flagos")), reference))
    with pytest.raises(ArithmeticError, match="flagos cannot do 8 rows"):
        layer(torch.ones(8, HIDDEN))


def test_a_failure_goes_up_under_strict() -> None:
    layer = bound(SelectionPolicy(strict=True), flagos=breaks_later("flagos"))
    with pytest.raises(ArithmeticError, match="flagos cannot do 8 rows"):
        layer(torch.ones(8, HIDDEN))


def test_rotary_that_fails_comes_to_sglang_in_sglangs_shape() -> None:
    def fn(obj: Any, query: torch.Tensor, key: torch.Tensor, *_: Any) -> Any:
        if query.shape[0] > 4:
            raise ArithmeticError
        return query, key

    set_global_policy(SelectionPolicy(per_op_order=(("rotary_embedding", ("flagos", "sglang")),)))
    layer: Any = rotary("RotaryEmbedding")
    bind(layer, manager_of(OpImpl("rotary_embedding", "default.flagos", D, fn, writes_inputs=False)))
    query, positions = torch.randn(6, 128), torch.arange(6)
    expected = layer.forward_native(positions, query, query)
    got = layer(positions, query, query)
    assert torch.equal(got[0], expected[0]) and got[0].shape == query.shape


def test_the_log_tells_what_ran_and_only_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    open_dispatch_log(str(path))
    layer = bound()
    assert not path.exists(), "nothing has run yet"
    for _ in range(3):
        layer(X.clone())
    assert path.read_text() == "[OOT-DISPATCH] RMSNorm → flagos(default.flagos)\n"
    with with_preference("vendor"):
        layer(X.clone())
    assert path.read_text().splitlines()[1:] == ["[OOT-DISPATCH] RMSNorm → vendor(vendor.x)"]


def test_after_its_first_call_a_layer_runs_the_plain_forward() -> None:
    """A model's second norm: its first one is called a few times before, since passes are counted by it."""
    first_norm, layer = norm(), norm()
    bound(layer=nn.Sequential(first_norm, layer))
    first_norm(X.clone())
    first = layer._forward_method.__func__
    layer(X.clone())
    assert layer._forward_method.__func__ is not first
    assert layer._forward_method.__name__ == "forward_default.flagos"
