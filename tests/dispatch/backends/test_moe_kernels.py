# SPDX-License-Identifier: Apache-2.0
"""Routing and experts of the kernel backends: their glue, on stand-ins that take what the real kernels take and no more."""

import logging
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accuracy import DTYPES
from backend_functions import Functions
from flaggems_here import gems
from moe_accuracy import refused
from torch.nn import functional
from torch_npu_stand_in import torch_npu

from sglang_fl.check.cases import Case
from sglang_fl.check.cases.call import Draw, rows_of
from sglang_fl.check.cases.moe import ExpertsForm, RoutingForm
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import OK, SIZES
from sglang_fl.check.implementation import Implementation
from sglang_fl.dispatch import Refusal
from sglang_fl.dispatch.backends.flaggems import flaggems as flaggems_backend
from sglang_fl.dispatch.backends.moe import Experts, Routing
from sglang_fl.dispatch.backends.reference.impl import moe as reference
from sglang_fl.dispatch.backends.vendor.ascend import ascend as ascend_backend
from sglang_fl.dispatch.backends.vendor.cuda import cuda as cuda_backend

__all__ = ["gems"]

WHEEL = Path(__file__).resolve().parents[3] / ".venv" / "torch_npu"
#: Cases of routing that no kernel here takes, and those that FlagGems does not take beside them.
BY_BEST = {"experts=160 top_k=6 groups=8 topk_group=3 factor=16 as_they_are", "experts=160 top_k=6 groups=8 topk_group=3 scoring=sigmoid"}
WITHOUT_BIAS = {"scoring=sigmoid"}


def moe_fused_gate(
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    topk: int,
    scoring_func: str = "sigmoid",
    num_fused_shared_experts: int = 0,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    apply_routed_scaling_factor_on_output: bool = False,
    moe_softcapping: float = 0.0,
    num_expert_group: int = 1,
    topk_group: int = 1,
    *,
    num_token_non_padded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's kernel: shared columns weigh 1, or the reciprocal of the factor where that is not applied."""
    assert scores.numel() and moe_softcapping == 0 and topk > num_fused_shared_experts
    if bias is None:
        assert scoring_func == "softmax" and num_expert_group == 1
    else:
        assert scoring_func == "sigmoid" and bias.dim() == 1 and bias.is_floating_point()
    scale = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1.0
    shared = (1.0 if apply_routed_scaling_factor_on_output else 1 / routed_scaling_factor) if num_fused_shared_experts else None
    routing = Routing(topk - num_fused_shared_experts, scoring_func, renormalize, num_expert_group, topk_group, scale, shared)
    weights, ids = reference.route(scores.nan_to_num(-1e30), bias, routing, num_token_non_padded)
    return weights.masked_fill(ids < 0, 0.0), ids


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Functions:
    kernel = ModuleType("sglang.kernels.ops.moe.moe_fused_gate")
    kernel.moe_fused_gate = moe_fused_gate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    monkeypatch.delitem(sys.modules, "sglang_fl.dispatch.backends.vendor.cuda.impl.moe", raising=False)
    return Functions(cuda_backend.BACKEND)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_topk(cuda: Functions, dtype: torch.dtype) -> None:
    assert refused("topk", cuda.topk, dtype).keys() == BY_BEST | WITHOUT_BIAS


def test_the_cuda_kernel_counts_in_int32(cuda: Functions) -> None:
    layer = SimpleNamespace(topk_config=RoutingForm()._config(None))
    far = torch.empty_strided((3, 64), (2**30, 1), device="meta")
    with pytest.raises(Refusal, match="topk: the kernel counts in int32, and 3 rows lie 1073741824 numbers apart"):
        cuda.topk(layer, far, far)


def test_the_cuda_kernels_signature_is_the_real_one() -> None:
    import inspect

    from sglang.kernels.ops.moe.moe_fused_gate import moe_fused_gate as real

    parameters = inspect.signature(real).parameters
    for name, parameter in inspect.signature(moe_fused_gate).parameters.items():
        assert (parameters[name].kind, parameters[name].default) == (parameter.kind, parameter.default), name


@pytest.fixture(scope="module")
def ascend() -> Iterator[Functions]:
    if not WHEEL.exists():
        pytest.skip("torch_npu's wheel is not there to be read (make .venv/ready-test puts it into .venv/torch_npu)")
    package = "sglang_fl.dispatch.backends.vendor.ascend.impl"
    names = [package, *(f"{package}.{name}" for name in ("activation", "moe", "normalization", "rotary"))]
    module, library = torch_npu(WHEEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_npu", module)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        yield Functions(ascend_backend.BACKEND)
        for name in names:
            sys.modules.pop(name, None)
    library._destroy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ascend_topk(ascend: Functions, dtype: torch.dtype) -> None:
    assert refused("topk", ascend.topk, dtype) == {}


def test_ascend_takes_no_groups_that_its_operator_has_not(ascend: Functions) -> None:
    route = import_module("sglang_fl.dispatch.backends.vendor.ascend.impl.moe").route
    for groups, experts in ((8, 16), (100, 400)):
        with pytest.raises(ValueError, match=f"no {groups} groups of {experts // groups} experts"):
            route(torch.zeros(2, experts), None, Routing(2, "sigmoid", True, groups, 2, 1.0, None), None)


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool,
) -> None:
    """FlagGems's kernel as it is: rows one after the other, 1e-8 in both sums, and no care for nan."""
    tokens, experts = gating_output.shape
    assert gating_output.is_contiguous() and tokens and experts <= 1024
    for x, dtype in ((topk_weights, torch.float32), (topk_indices, torch.int32), (token_expert_indices, torch.int32)):
        assert x.shape == (tokens, topk_weights.shape[1]) and x.dtype == dtype and x.is_contiguous()
    assert topk_weights.shape[1] <= 32
    logits = gating_output.float()
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
    weights, ids = (exponentials / (exponentials.sum(-1, keepdim=True) + 1e-8)).topk(topk_weights.shape[1], dim=-1)
    topk_weights.copy_(weights / (weights.sum(-1, keepdim=True) + 1e-8) if renormalize else weights)
    # The place that it chooses among nan is one of those that it looks at.
    topk_indices.copy_(ids.masked_fill(weights.isnan(), max(32, 1 << (experts - 1).bit_length()) - 1))


def grouped_topk(
    scores: torch.Tensor,
    n_group: int,
    topk_group: int,
    topk: int,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: torch.Tensor,
    scoring_func: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, experts = scores.shape
    assert tokens and experts % n_group == 0 and n_group <= 32 and topk <= 32 and topk & (topk - 1) == 0
    topk, wanted = min(topk, experts), topk  # beyond all experts the real one repeats them
    assert scoring_func == 0 and scores.dtype == bias.dtype == torch.float32 and bias.shape == (experts,)
    routing = Routing(topk, "sigmoid", renormalize, n_group, topk_group, routed_scaling_factor, None)
    weights, ids = reference.route(scores.logit(), bias, routing, None)
    weights, ids = (functional.pad(x, (0, wanted - topk)) for x in (weights, ids))
    return weights, ids.masked_fill(scores.isnan().any(-1, keepdim=True), experts + 1)


def fused_experts_impl(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    inplace: bool = False,
    activation: str = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: torch.Tensor | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """FlagGems's function: routes are counted by their ids, unless there are few, and the map says where experts are."""
    assert activation == "silu" and not inplace and topk_weights.shape == topk_ids.shape and topk_ids.numel()
    assert all(x.is_contiguous() for x in (hidden_states, topk_weights, topk_ids)) and topk_ids.dtype == torch.int32
    assert w1.stride(-1) == w2.stride(-1) == 1 and w1.dtype == hidden_states.dtype != torch.float32
    places = w1.shape[0] if global_num_experts == -1 else global_num_experts
    sparse = expert_map is None and topk_ids.numel() * 4 <= places
    if not sparse:
        assert ((topk_ids >= 0) & (topk_ids < places)).all(), "counters lie beside memory that is not theirs"
        if expert_map is not None:
            assert expert_map.shape == (places,) and expert_map.dtype == torch.int32
            topk_ids = expert_map[topk_ids]
    out = torch.zeros(hidden_states.shape)
    for expert in range(w1.shape[0]):
        rows, columns = (topk_ids == expert).nonzero(as_tuple=True)
        weight = topk_weights[rows, columns].unsqueeze(-1)
        hidden = functional.linear(hidden_states[rows].float(), w1[expert].float(), None if w1_bias is None else w1_bias[expert])
        hidden = (hidden * weight if apply_router_weight_on_input else hidden).to(w1.dtype).float()
        gate, up = hidden.chunk(2, dim=-1)
        inner = (functional.silu(gate) * up).to(w1.dtype).float()
        y = functional.linear(inner, w2[expert].float(), None if w2_bias is None else w2_bias[expert])
        out.index_add_(0, rows, (y if apply_router_weight_on_input else y * weight).to(w1.dtype).float())
    return out.to(hidden_states.dtype)


@pytest.fixture
def flagos(gems: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Functions:
    impl = import_module("sglang_fl.dispatch.backends.flaggems.impl.moe")
    for function in (topk_softmax, grouped_topk, fused_experts_impl):
        monkeypatch.setattr(impl, function.__name__, function)
    return Functions(flaggems_backend.BACKEND)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flagos_topk(flagos: Functions, dtype: torch.dtype) -> None:
    assert refused("topk", flagos.topk, dtype).keys() == BY_BEST | WITHOUT_BIAS


@pytest.mark.parametrize("words", rows_of("top_k={9,10,12,22} | top_k=22 as_they_are factor=2.5 on_output | top_k=9 experts=12"))
def test_flagos_chooses_any_number_of_experts(flagos: Functions, words: str) -> None:
    """Its kernel of sigmoid scores chooses 1, 2, 4, 8, … of them."""
    form = RoutingForm().of(f"tokens=17 experts=512 scoring=sigmoid bias=float32 {words}")
    case = Case("topk", SIZES, words, "bfloat16", form)
    outcome = check_case(Implementation("topk", flagos.topk, None, torch.device("cpu")), case, 3)
    assert outcome.status == OK, outcome.message


@pytest.mark.parametrize(
    ("routing", "experts", "told"),
    [
        (Routing(33, "softmax", True, 1, 1, 1.0, None), 64, "up to 32 experts, not 33"),
        (Routing(2, "softmax", True, 1, 1, 1.0, None), 2048, "over up to 1024 experts, not 2048"),
        (Routing(2, "sigmoid", True, 64, 4, 1.0, None), 256, "up to 32 groups, not 64"),
    ],
)
def test_routing_beyond_flaggems_limits(flagos: Functions, routing: Routing, experts: int, told: str) -> None:
    route = import_module("sglang_fl.dispatch.backends.flaggems.impl.moe").route
    bias = torch.zeros(experts) if routing.scoring == "sigmoid" else None
    with pytest.raises(NotImplementedError, match=told):
        route(torch.zeros(2, experts), bias, routing, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flagos_experts(flagos: Functions, dtype: torch.dtype) -> None:
    activations = {f"activation={name}" for name in ("gelu", "gelu_tanh", "relu2")}
    ungated = {f"activation={name} not_gated" for name in ("silu", "gelu", "gelu_tanh", "relu2")}
    assert refused("fused_moe", flagos.fused_moe, dtype).keys() == activations | ungated


@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_batches_of_few_routes_are_not_sorted(flagos: Functions, tokens: int) -> None:
    from moe_accuracy import check

    check("fused_moe", flagos.fused_moe, ExpertsForm(tokens=tokens, experts=32, elsewhere=0.4), torch.bfloat16)


def test_flagos_takes_no_fp32(flagos: Functions) -> None:
    call = ExpertsForm()(Draw(torch.Generator().manual_seed(0), torch.float32, torch.device("cpu")))
    arguments, _ = call.arguments()
    with pytest.raises(TypeError, match="TF32"):
        flagos.fused_moe(*arguments)


def test_what_the_sorting_needs_is_made_at_the_first_call(flagos: Functions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may be captured at the next: a tensor that is made then has its numbers only when the graph is replayed."""
    impl = import_module("sglang_fl.dispatch.backends.flaggems.impl.moe")
    impl._expert_map.cache_clear()
    made = []
    monkeypatch.setattr(impl, "_places", lambda count: made.append(count) or 1 << count.bit_length())
    w13, w2 = torch.zeros(32, 8, 16, dtype=torch.bfloat16), torch.zeros(32, 16, 4, dtype=torch.bfloat16)
    experts = Experts("silu", True, False)
    for tokens in (1, 100):
        x, ids = torch.zeros(tokens, 16, dtype=torch.bfloat16), torch.zeros(tokens, 2, dtype=torch.int32)
        impl.compute(x, w13, w2, torch.ones(tokens, 2), ids, None, None, experts)
        assert impl._expert_map.cache_info().currsize == 1


def test_flaggems_says_once_that_it_was_not_tuned(gems: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    import_module("sglang_fl.dispatch.backends.flaggems.impl.moe")
    logger = logging.getLogger("flag_gems.fused.fused_moe")
    caplog.set_level(logging.INFO, logger.name)
    for _ in range(3):
        logger.warning("No embedded MoE config for device=%s, key=%s.", "a test's", "8,32")
    assert caplog.text.count("a test's") == 1
