# SPDX-License-Identifier: Apache-2.0
"""Every check finds the mistake that it is there for, and finds nothing in an implementation that is right."""

import secrets
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backend_functions import reference
from graphs_on_cpu import Graph, capture

from sglang_fl.check import graphs
from sglang_fl.check.cases import OPERATORS_CHECKED, cases_of
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import (
    BATCH,
    COMPILE,
    DEVICE_LOST,
    FAILED,
    GRAPH,
    INPUTS,
    NO_MEMORY,
    OK,
    REFUSED,
    REPEATS,
    SERVING,
    SIZES,
    SKIPPED,
    SPECIAL,
    THREADS,
    UNUSUAL,
)
from sglang_fl.check.implementation import Implementation
from sglang_fl.check.results import Outcome
from sglang_fl.dispatch import Refusal
from sglang_fl.dispatch.backends.reference.impl import moe as reference_moe
from sglang_fl.dispatch.kernel_implementations import is_kernel
from sglang_fl.dispatch.ops import OPERATORS

CPU = torch.device("cpu")
Found = dict[str, list[Outcome]]


@pytest.fixture(autouse=True)
def graphs_and_a_quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "graphs_of", lambda device: (Graph, capture))
    monkeypatch.setattr(graphs, "compiler_of", lambda device: "eager")


def found(op: str, fn: Callable[..., Any], *checks: str, writes_inputs: bool = True) -> Found:
    """What comes of an implementation's cases, by kind of check."""
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    impl = Implementation(op, fn, getattr(reference, op), CPU, writes_inputs=writes_inputs)
    outcomes: Found = {}
    for case in cases_of(op, None, CPU, quick=True):
        if not checks or case.check in checks:
            outcomes.setdefault(case.check, []).append(check_case(impl, case, seed))
    return outcomes


def test_every_operator_has_cases() -> None:
    assert {op for op in OPERATORS_CHECKED if not is_kernel(op)} == set(OPERATORS)
    for op, operator in OPERATORS_CHECKED.items():
        cases = list(cases_of(op, None, CPU, quick=False))
        some = {name for name, has in ((GRAPH, operator.captured), (COMPILE, operator.compiled), (SPECIAL, operator.special)) if has}
        assert {case.check for case in cases} == {SERVING, SIZES, UNUSUAL, INPUTS, REPEATS, THREADS} | some
        assert len({(case.check, case.name, case.dtype) for case in cases}) == len(cases), "a case cannot be told from another"


def test_only_the_dtypes_that_are_declared() -> None:
    for case in cases_of("rms_norm", frozenset({torch.float16}), CPU, quick=True):
        assert case.dtype == "float16"


@pytest.mark.parametrize("op", OPERATORS)
def test_the_reference_is_right(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on an accelerator: what the numbers are must not decide what is run.
    monkeypatch.setattr(reference_moe, "can_be_asked", lambda device: False)
    for check, outcomes in found(op, getattr(reference, op), writes_inputs=False).items():
        assert [outcome for outcome in outcomes if outcome.status != OK] == [], check
        for outcome in outcomes:
            if check in (SERVING, SIZES, UNUSUAL, SPECIAL) and outcome.error_ulp is not None:
                assert outcome.bound_ulp is not None and outcome.error_ulp <= outcome.bound_ulp
                assert outcome.reference_ulp == outcome.error_ulp


def test_inputs_may_be_written_where_the_text_allows_it() -> None:
    def gemma_norm(layer: Any, x: Any, residual: Any = None) -> Any:
        got = reference.gemma_rms_norm(layer, x, residual)
        return got if residual is None else (x.copy_(got[0]), residual.copy_(got[1]))

    def norm(layer: Any, x: Any, residual: Any = None) -> Any:
        got = reference.rms_norm(layer, x, residual)
        return got if residual is None else (x.copy_(got[0]), residual.copy_(got[1]))

    def rotary(layer: Any, query: Any, key: Any, cos: Any, sin: Any, positions: Any, interleaved: bool, inplace: bool) -> Any:
        got = reference.rotary_embedding(layer, query, key, cos, sin, positions, interleaved)
        return (query.copy_(got[0]), key.copy_(got[1])) if inplace else got

    for op, fn in (("gemma_rms_norm", gemma_norm), ("rms_norm", norm), ("rotary_embedding", rotary)):
        for check, outcomes in found(op, fn).items():
            assert [outcome for outcome in outcomes if outcome.status != OK] == [], check


class Other:
    """A layer like another, with some things changed."""

    def __init__(self, layer: Any, **changes: Any):
        self.weight, self.bias, self.variance_epsilon, self.approximate = (
            layer.weight,
            layer.bias,
            layer.variance_epsilon,
            layer.approximate,
        )
        vars(self).update(changes)


def wrong_eps(layer: Any, x: Any, residual: Any = None) -> Any:
    return reference.rms_norm(Other(layer, variance_epsilon=1e-5), x, residual)


def accumulated_in_its_dtype(layer: Any, x: Any, residual: Any = None) -> Any:
    hidden = x if residual is None else x + residual
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + layer.variance_epsilon) * layer.weight.to(x.dtype)
    return normed if residual is None else (normed, hidden)


def sum_rounded_before_norm(layer: Any, x: Any, residual: Any = None) -> Any:
    return reference.rms_norm(layer, x) if residual is None else (reference.rms_norm(layer, x + residual), x + residual)


def writes_x(layer: Any, x: Any, residual: Any = None) -> Any:
    got = reference.rms_norm(layer, x, residual)
    x.zero_()
    return got


def writes_the_weights(layer: Any, x: Any, residual: Any = None) -> Any:
    got = reference.rms_norm(layer, x, residual)
    layer.weight.data.mul_(2)
    return got


def order_of_the_sum_by_chance(layer: Any, x: Any, residual: Any = None) -> Any:
    """Within the bound, and another result each time."""
    hidden = x.float() if residual is None else x.float() + residual
    total = hidden.square()[..., torch.randperm(x.shape[-1])].sum(-1, keepdim=True)
    y = (hidden * torch.rsqrt(total / x.shape[-1] + layer.variance_epsilon) * layer.weight.float()).to(x.dtype)
    return y if residual is None else (y, hidden.to(x.dtype))


def one_result_for_two(layer: Any, x: Any, residual: Any = None) -> Any:
    got = reference.rms_norm(layer, x, residual)
    return got if residual is None else got[0]


def nothing_without_tokens(layer: Any, x: Any, residual: Any = None) -> Any:
    if not x.numel():
        raise RuntimeError("invalid configuration argument")
    return reference.rms_norm(layer, x, residual)


def weights_taken_for_the_dtype_of_x(layer: Any, x: Any, residual: Any = None) -> Any:
    weight = layer.weight.data
    return reference.rms_norm(Other(layer, weight=weight.view(x.dtype)[: weight.shape[0]]), x, residual)


def weight_without_one(layer: Any, x: Any, residual: Any = None) -> Any:
    return reference.rms_norm(layer, x, residual)


def one_and_weight_rounded(layer: Any, x: Any, residual: Any = None) -> Any:
    """As with SGLang's gemma_weight, a buffer in the model's dtype."""
    return reference.rms_norm(Other(layer, weight=1 + layer.weight.to(x.dtype)), x, residual)


def bias_forgotten(layer: Any, x: Any) -> Any:
    return reference.layer_norm(Other(layer, bias=torch.zeros_like(layer.weight)), x)


def variance_in_one_pass(layer: Any, x: Any) -> Any:
    hidden = x.float()
    mean = hidden.mean(-1, keepdim=True)
    variance = (hidden.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
    normed = (hidden - mean) * torch.rsqrt(variance + layer.variance_epsilon)
    return (normed * layer.weight.float() + layer.bias.float()).to(x.dtype)


def gelus_swapped(layer: Any, x: Any) -> Any:
    return reference.gelu_and_mul(Other(layer, approximate={"none": "tanh", "tanh": "none"}[layer.approximate]), x)


def gelu_rounded_before_the_product(layer: Any, x: Any) -> Any:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.gelu(gate, approximate=layer.approximate) * up


def quick_for_new(layer: Any, x: Any) -> Any:
    return reference.quick_gelu(layer, x)


def sigmoid_in_its_dtype(layer: Any, x: Any) -> Any:
    return x * torch.sigmoid(1.702 * x)


def squared_on_both_sides(layer: Any, x: Any) -> Any:
    return (x.float() ** 2).to(x.dtype)


def strides_ignored(layer: Any, x: Any) -> Any:
    strides = torch.empty(x.shape, device="meta").stride()
    if x.numel() and x.untyped_storage().nbytes() < (x.storage_offset() + x.numel()) * x.itemsize:
        return torch.zeros_like(x[..., : x.shape[-1] // 2])
    return reference.silu_and_mul(layer, x.as_strided(x.shape, strides))


def wrong_shape(layer: Any, x: Any) -> Any:
    return reference.silu_and_mul(layer, x).flatten()


def a_list_of_one(layer: Any, x: Any) -> Any:
    return [reference.silu_and_mul(layer, x)]


def written_as_if_it_counted_versions(layer: Any, x: Any) -> Any:
    result = reference.silu_and_mul(layer, x)
    if result._version:  # in inference mode a tensor has no version
        raise RuntimeError("it was written")
    return result


def exits_from_threads(layer: Any, x: Any) -> Any:
    if threading.current_thread() is not threading.main_thread():
        sys.exit("no licence")
    return reference.silu_and_mul(layer, x)


def wrong_dtype(layer: Any, x: Any) -> Any:
    return reference.silu_and_mul(layer, x.float())


def none_for_a_result(layer: Any, x: Any) -> Any:
    x[..., : x.shape[-1] // 2].copy_(reference.silu_and_mul(layer, x))


def nan_swallowed(layer: Any, x: Any) -> Any:
    return torch.where(torch.isnan(x.float().sum(-1, keepdim=True)), 0, reference.silu_and_mul(layer, x))


def infinity_clamped(layer: Any, x: Any) -> Any:
    return reference.silu_and_mul(layer, x).clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)


def nan_spreads(layer: Any, x: Any) -> Any:
    return reference.silu_and_mul(layer, x) + x.sum().to(x.dtype) * 0


BUFFER = torch.zeros(1 << 20)


def scratch_for_all_threads(layer: Any, x: Any) -> Any:
    if x.shape[-1] * x.numel() == 0 or x.numel() > len(BUFFER):
        return reference.silu_and_mul(layer, x)
    scratch = BUFFER[: x.numel()].view(x.shape)
    scratch.copy_(x)
    return reference.silu_and_mul(layer, scratch.to(x.dtype))


def result_in_a_buffer_of_its_own(layer: Any, x: Any) -> Any:
    got = reference.silu_and_mul(layer, x)
    place = BUFFER.view(x.dtype)[: got.numel()]
    return place.copy_(got.flatten()).view(got.shape) if got.numel() < 200_000 else got


TURNS = [torch.empty(1 << 20), torch.empty(1 << 20)]


def results_in_two_buffers_by_turns(layer: Any, x: Any) -> Any:
    TURNS.reverse()
    got = reference.silu_and_mul(layer, x)
    place = TURNS[0].view(x.dtype)[: got.numel()]
    return place.copy_(got.flatten()).view(got.shape) if got.numel() < 200_000 else got


def seeds_the_generator(layer: Any, x: Any) -> Any:
    torch.manual_seed(0)
    return reference.silu_and_mul(layer, x)


def one_and_weight_kept(layer: Any, x: Any, residual: Any = None) -> Any:
    """Made once a layer, as a loader would, and never again."""
    if not hasattr(layer, "plus_one"):
        layer.plus_one = (1 + layer.weight.float()).clone()
    return reference.rms_norm(Other(layer, weight=layer.plus_one, variance_epsilon=layer.variance_epsilon), x, residual)


def another_way_for_large_batches(layer: Any, x: Any, residual: Any = None) -> Any:
    squares = x.float().square()
    mean = (squares if len(x) > 8 else squares * 1.01).mean(-1, keepdim=True)
    return (x.float() * torch.rsqrt(mean + layer.variance_epsilon) * layer.weight.float()).to(x.dtype)


def behind_the_graphs_back(layer: Any, x: Any) -> Any:
    """NumPy computes while the graph is captured, and never again."""
    return torch.from_numpy(reference.silu_and_mul(layer, x.float()).numpy().copy()).to(x.dtype)


SHARED = torch.zeros(1)


def a_table_that_the_next_call_writes(layer: Any, x: Any) -> Any:
    """The host fills it at each call, and a graph reads it when it is replayed: a stale pointer."""
    SHARED.numpy()[0] = max(1, len(x))
    return reference.silu_and_mul(layer, x) * (SHARED / max(1, len(x))).to(x.dtype)


#: Looked up here, not inside the function: torch.compile does not trace the import behind it.
_silu_and_mul = reference.silu_and_mul


def wrong_when_compiled(layer: Any, x: Any) -> Any:
    got = _silu_and_mul(layer, x)
    return got * 2 if torch.compiler.is_compiling() else got


def layouts_swapped(layer: Any, q: Any, k: Any, c: Any, s: Any, p: Any, interleaved: bool = False, inplace: bool = True) -> Any:
    return reference.rotary_embedding(layer, q, k, c, s, p, not interleaved)


def always_in_place(layer: Any, q: Any, k: Any, c: Any, s: Any, p: Any, interleaved: bool = False, inplace: bool = True) -> Any:
    got = reference.rotary_embedding(layer, q, k, c, s, p, interleaved)
    return q.copy_(got[0]), k.copy_(got[1])


def writes_beyond_the_keys(layer: Any, q: Any, k: Any, c: Any, s: Any, p: Any, interleaved: bool = False, inplace: bool = True) -> Any:
    got = reference.rotary_embedding(layer, q, k, c, s, p, interleaved)
    beyond = k.storage_offset() + k.shape[1] * k.shape[2]
    if k.shape[0] and (beyond + 1) * k.itemsize <= k.untyped_storage().nbytes():
        k.as_strided((1,), (1,), beyond).fill_(7)
    return got


def rest_dropped(layer: Any, q: Any, k: Any, c: Any, s: Any, p: Any, interleaved: bool = False, inplace: bool = True) -> Any:
    got = reference.rotary_embedding(layer, q, k, c, s, p, interleaved)
    for x in got:
        x[..., 2 * c.shape[-1] :] = 0
    return got


def positions_in_16_bits(layer: Any, q: Any, k: Any, c: Any, s: Any, p: Any, interleaved: bool = False, inplace: bool = True) -> Any:
    return reference.rotary_embedding(layer, q, k, c, s, p & 0xFFFF, interleaved)


def cos_kept_by_address(layer: Any, query: Any, key: Any, cos: Any, sin: Any, positions: Any, *flags: bool) -> Any:
    kept = layer.__dict__.setdefault("kept", {})
    tables = kept.setdefault((cos.data_ptr(), cos.shape), (cos.clone(), sin.clone()))
    return reference.rotary_embedding(layer, query, key, *tables, positions, *flags)


def cos_in_bf16(layer: Any, q: Any, k: Any, c: Any, s: Any, p: Any, interleaved: bool = False, inplace: bool = True) -> Any:
    return reference.rotary_embedding(layer, q, k, c.bfloat16(), s.bfloat16(), p, interleaved)


def sections_exchanged(layer: Any, positions: Any, query: Any, key: Any) -> Any:
    return reference.mrotary_embedding(layer, positions.flip(0) if positions.dim() == 2 else positions, query, key)


def sections_never_interleaved(layer: Any, positions: Any, query: Any, key: Any) -> Any:
    names = ("cos_sin_cache", "head_size", "is_neox_style", "mrope_section", "mrope_interleaved")
    axes = torch.cat([torch.full((size,), axis) for axis, size in enumerate(layer.mrope_section)])
    other = Other(layer, **{name: getattr(layer, name) for name in names}, axis_map=axes)
    return reference.mrotary_embedding(other, positions, query, key)


@pytest.mark.parametrize(
    ("op", "mistake", "check", "message"),
    [
        ("rms_norm", wrong_eps, UNUSUAL, "out of bounds"),
        ("rms_norm", accumulated_in_its_dtype, SERVING, "out of bounds"),
        ("rms_norm", sum_rounded_before_norm, SERVING, "out of bounds"),
        ("rms_norm", writes_x, SERVING, "wrote x, which is read-only"),
        ("rms_norm", writes_the_weights, INPUTS, "wrote the layer's weight, which is read-only"),
        ("rms_norm", order_of_the_sum_by_chance, REPEATS, "not deterministic"),
        ("rms_norm", one_result_for_two, SERVING, "returned 1 results, not 2: result, residual"),
        ("rms_norm", nothing_without_tokens, UNUSUAL, "raised RuntimeError: invalid configuration argument"),
        ("rms_norm", weights_taken_for_the_dtype_of_x, UNUSUAL, ""),
        ("gelu_and_mul", gelus_swapped, SERVING, "out of bounds"),
        ("gelu_and_mul", gelu_rounded_before_the_product, SERVING, "out of bounds"),
        ("gemma_rms_norm", weight_without_one, SERVING, "out of bounds"),
        ("gemma_rms_norm", one_and_weight_rounded, SERVING, "out of bounds"),
        ("gemma_rms_norm", writes_x, SERVING, "wrote x, which is read-only"),
        ("layer_norm", bias_forgotten, SERVING, "out of bounds"),
        ("layer_norm", variance_in_one_pass, UNUSUAL, "out of bounds"),
        ("new_gelu", quick_for_new, SERVING, "out of bounds"),
        ("quick_gelu", sigmoid_in_its_dtype, SERVING, "out of bounds"),
        ("relu2", squared_on_both_sides, SERVING, "out of bounds"),
        ("silu_and_mul", strides_ignored, UNUSUAL, "out of bounds"),
        ("silu_and_mul", wrong_shape, SERVING, "result has shape (3072,), not (1, 3072)"),
        ("silu_and_mul", wrong_dtype, SERVING, "result is torch.float32, not torch.bfloat16"),
        ("silu_and_mul", none_for_a_result, UNUSUAL, ""),
        ("silu_and_mul", a_list_of_one, SERVING, "result is list, not a tensor"),
        ("silu_and_mul", written_as_if_it_counted_versions, SERVING, "Inference tensors do not track version counter"),
        ("silu_and_mul", exits_from_threads, THREADS, "in 4 threads at once: SystemExit"),
        ("silu_and_mul", nan_swallowed, SPECIAL, "out of bounds"),
        ("silu_and_mul", infinity_clamped, SPECIAL, "e+38, exact"),
        ("silu_and_mul", nan_spreads, SPECIAL, "nan, exact"),
        ("silu_and_mul", scratch_for_all_threads, THREADS, "in 4 threads at once: another result than in a single thread"),
        ("silu_and_mul", result_in_a_buffer_of_its_own, INPUTS, "a later call changed the results of this one"),
        ("silu_and_mul", results_in_two_buffers_by_turns, INPUTS, "a later call changed the results of this one"),
        ("silu_and_mul", seeds_the_generator, INPUTS, "it changed the state of PyTorch's random number generator"),
        ("gemma_rms_norm", one_and_weight_kept, INPUTS, "after the layer's weights were updated in place: result"),
        ("silu_and_mul", behind_the_graphs_back, GRAPH, "replay 1 with new data: result (torch.bfloat16)"),
        ("silu_and_mul", a_table_that_the_next_call_writes, GRAPH, "replay 1 with new data: result (torch.bfloat16)"),
        ("silu_and_mul", wrong_when_compiled, COMPILE, "compiled by eager: result (torch.bfloat16)"),
        ("rotary_embedding", layouts_swapped, SERVING, "out of bounds"),
        ("rotary_embedding", always_in_place, SERVING, "wrote query, key, which is read-only"),
        ("rotary_embedding", writes_beyond_the_keys, SERVING, "wrote the values behind the keys, which is read-only"),
        ("rotary_embedding", rest_dropped, UNUSUAL, "out of bounds"),
        ("rotary_embedding", positions_in_16_bits, UNUSUAL, "out of bounds"),
        ("rotary_embedding", cos_kept_by_address, INPUTS, "with new numbers in the memory of the former inputs: query"),
        ("rotary_embedding", cos_in_bf16, SERVING, "out of bounds"),
        ("mrotary_embedding", sections_exchanged, SERVING, "out of bounds"),
        ("mrotary_embedding", sections_never_interleaved, SERVING, "out of bounds"),
    ],
)
def test_a_mistake_is_caught(op: str, mistake: Callable[..., Any], check: str, message: str) -> None:
    failures = [outcome for outcome in found(op, mistake, check)[check] if outcome.status == FAILED]
    assert failures, f"{check} found nothing"
    assert any(message in outcome.message for outcome in failures), failures


def batch_invariance(op: str, fn: Callable[..., Any]) -> list[Outcome]:
    impl = Implementation(op, fn, getattr(reference, op), CPU)
    cases = cases_of(op, None, CPU, quick=True, batch_invariant=True)
    return [check_case(impl, case, secrets.randbits(31)) for case in cases if case.check == BATCH]


@pytest.mark.parametrize("op", [op for op in OPERATORS if op != "fused_moe"])  # PyTorch's matrix product is not
def test_what_is_batch_invariant_passes(op: str) -> None:
    """Where tokens depend on each other it says that nothing was checked."""
    outcomes = batch_invariance(op, getattr(reference, op))
    assert {outcome.status for outcome in outcomes} == {OK if OPERATORS_CHECKED[op].tokens_in else SKIPPED}


def test_a_result_that_depends_on_the_batch() -> None:
    outcomes = batch_invariance("rms_norm", another_way_for_large_batches)
    messages = {outcome.message for outcome in outcomes if outcome.status == FAILED}
    assert messages == {"declared batch-invariant: token 0 has other results alone than in a batch of 64"}


def sets_the_default_dtype(layer: Any, x: Any) -> Any:
    torch.set_default_dtype(torch.bfloat16)
    return reference.silu_and_mul(layer, x)


def stops_recording_gradients(layer: Any, x: Any) -> Any:
    torch.set_grad_enabled(False)
    return reference.silu_and_mul(layer, x)


@pytest.mark.parametrize(
    ("mistake", "change"),
    [
        (sets_the_default_dtype, "default dtype: from torch.float32 to torch.bfloat16"),
        (stops_recording_gradients, "gradients: from True to False"),
    ],
)
def test_what_the_process_shares_is_set_back(mistake: Callable[..., Any], change: str) -> None:
    outcomes = found("silu_and_mul", mistake, UNUSUAL)[UNUSUAL]
    assert {(outcome.status, outcome.message) for outcome in outcomes} == {(FAILED, f"it changed process-wide state of PyTorch: {change}")}
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("mistake", "check"),
    [(order_of_the_sum_by_chance, SERVING), (order_of_the_sum_by_chance, UNUSUAL), (nothing_without_tokens, SERVING), (wrong_eps, SERVING)],
)
def test_only_that_check_sees_it(mistake: Callable[..., Any], check: str) -> None:
    """What makes the other kinds of check necessary."""
    assert {outcome.status for outcome in found("rms_norm", mistake, check)[check]} == {OK}


def test_whether_the_device_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next case gets a new process if not."""

    def raises(layer: Any, x: Any) -> Any:
        raise RuntimeError("illegal memory access")

    assert {outcome.status for outcome in found("silu_and_mul", raises, SERVING, GRAPH)[SERVING]} == {FAILED}
    ones = torch.ones

    def lost(*size: Any, **more: Any) -> Any:
        return ones(*size, **more) if more.get("device") is None else raises(None, None)

    monkeypatch.setattr(torch, "ones", lost)
    outcomes = found("silu_and_mul", raises, SERVING, GRAPH)
    assert {outcome.status for some in outcomes.values() for outcome in some} == {DEVICE_LOST}


def test_too_little_memory_for_a_capture_is_no_mistake() -> None:
    """Other workers may have taken it; the case runs again alone."""
    calls = 0

    def has_no_memory(layer: Any, x: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > graphs._WARM_UPS:
            raise torch.OutOfMemoryError("no memory")
        return reference.silu_and_mul(layer, x)

    (outcome,) = found("silu_and_mul", has_no_memory, GRAPH)[GRAPH]
    assert (outcome.status, outcome.message) == (NO_MEMORY, "no memory")


def test_what_torch_compile_shall_leave_alone_is_not_traced() -> None:
    """In a model. Given such a function itself, ``torch.compile`` traces it."""
    outcomes = found("silu_and_mul", torch.compiler.disable(wrong_when_compiled), COMPILE)[COMPILE]
    assert {outcome.status for outcome in outcomes} == {OK}


@pytest.mark.parametrize("refusal", [ValueError, TypeError, NotImplementedError])
def test_refusing_unusual_calls_is_no_failure(refusal: type[Exception]) -> None:
    def contiguous_only(layer: Any, x: Any) -> Any:
        if not x.is_contiguous():
            raise refusal("x must be contiguous")
        return reference.silu_and_mul(layer, x)

    outcomes = found("silu_and_mul", contiguous_only)
    assert {outcome.status for outcome in outcomes[UNUSUAL]} == {OK, REFUSED}
    refused = next(outcome for outcome in outcomes[UNUSUAL] if outcome.status == REFUSED)
    assert refused.message == f"refused: {refusal.__name__}: x must be contiguous"
    assert {outcome.status for outcome in outcomes[SIZES]} == {OK, REFUSED}, "rows that lie far apart are refused, too"
    assert {outcome.status for check, some in outcomes.items() if check not in (UNUSUAL, SIZES) for outcome in some} == {OK}


def test_refusing_what_serving_needs_is_one() -> None:
    def refuses(layer: Any, x: Any) -> Any:
        raise ValueError("not today")

    outcomes = found("silu_and_mul", refuses, SERVING, THREADS, GRAPH, COMPILE)
    assert {(outcome.status, outcome.message) for outcome in outcomes[SERVING]} == {
        (FAILED, "refused: ValueError: not today"),
        (REFUSED, "refused: ValueError: not today"),
    }
    assert {outcome.status for check in (THREADS, GRAPH, COMPILE) for outcome in outcomes[check]} == {REFUSED}


def test_refusing_more_numbers_than_int32_counts_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lower here; one number less may not be refused."""
    monkeypatch.setattr("sglang_fl.check.check_case.INT32", 1 << 15)

    def refuses_from(least: int) -> set[str]:
        def refuses(layer: Any, x: Any) -> Any:
            if x.numel() >= least:
                raise ValueError("too many")
            return reference.silu_and_mul(layer, x)

        return {outcome.status for outcome in found("silu_and_mul", refuses, SIZES)[SIZES]}

    assert refuses_from(1 << 15) == {OK, REFUSED}
    assert FAILED in refuses_from(1 << 14)


def test_refusing_what_has_no_tokens_is_one() -> None:
    def refuses(layer: Any, x: Any) -> Any:
        if not x.numel():
            raise ValueError("no tokens")
        return reference.silu_and_mul(layer, x)

    for case in cases_of("silu_and_mul", None, CPU, quick=True):
        if case.check == UNUSUAL:
            outcome = check_case(Implementation("silu_and_mul", refuses, reference.silu_and_mul, CPU), case, 7)
            assert outcome.status == (OK if case.draw(7, CPU).inputs["x"].numel() else FAILED), case.name


@pytest.mark.parametrize("error", [ValueError, Refusal])
@pytest.mark.parametrize("declared", [False, True])
def test_writing_before_refusing(declared: bool, error: type[Exception]) -> None:
    """Of x without a residual never; with one, only if the implementation says so of itself, and never before a Refusal."""

    def refuses_late(layer: Any, x: Any, residual: Any = None) -> Any:
        x.zero_()
        raise error("too late")

    outcomes = found("rms_norm", refuses_late, INPUTS, writes_inputs=declared)[INPUTS]
    without, with_residual = outcomes[:2]
    assert (without.status, without.message) == (FAILED, f"wrote x before it raised {error.__name__}: too late")
    assert with_residual.status == (REFUSED if declared and error is not Refusal else FAILED)


def test_a_device_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [(one.status, one.message) for one in found("silu_and_mul", reference.silu_and_mul, GRAPH)[GRAPH]] == [
        (SKIPPED, "cpu has no graphs")
    ]
