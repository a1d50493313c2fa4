# SPDX-License-Identifier: Apache-2.0
"""Mistakes in routing and in experts, and the check that finds each."""

import secrets
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backend_functions import reference
from torch.nn import functional

from sglang_fl.check.cases import cases_of
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import FAILED, INPUTS, OK, SERVING, SPECIAL, UNUSUAL
from sglang_fl.check.implementation import Implementation
from sglang_fl.dispatch.backends import moe as shared_moe

Function = Callable[..., Any]


def failures(op: str, fn: Function, *checks: str) -> list[str]:
    """``name: message`` of the cases in bf16 that an implementation fails."""
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    impl = Implementation(op, fn, None, torch.device("cpu"))
    outcomes = {
        case.name: check_case(impl, case, seed)
        for case in cases_of(op, frozenset({torch.bfloat16}), torch.device("cpu"), quick=True)
        if case.check in checks
    }
    assert outcomes
    return [f"{name}: {outcome.message}" for name, outcome in outcomes.items() if outcome.status == FAILED]


def with_config(**changes: Any) -> Function:
    """The reference, reading another configuration than the layer's."""

    def topk(obj: Any, *args: Any, **named: Any) -> Any:
        return reference.topk(SimpleNamespace(topk_config=SimpleNamespace(**{**vars(obj.topk_config), **changes})), *args, **named)

    return topk


def after(change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Function:
    return lambda *args, **named: change(*reference.topk(*args, **named))


def weighted_by_the_biased_scores(obj: Any, hidden_states: Any, router_logits: Any, **named: Any) -> Any:
    weights, ids = reference.topk(obj, hidden_states, router_logits, **named)
    bias = obj.topk_config.correction_bias
    if bias is None:
        return weights, ids
    return weights + bias[ids.clamp(0, len(bias) - 1).long()], ids


def padding_forgotten(*args: Any, num_token_non_padded: Any = None, **named: Any) -> Any:
    return reference.topk(*args, **named)


def sum_plus(epsilon: float) -> Function:
    """The reference, adding another number to what sigmoids' weights are divided by."""

    def topk(obj: Any, hidden_states: Any, router_logits: Any, **named: Any) -> Any:
        config = obj.topk_config
        if config.scoring_func != "sigmoid" or not config.renormalize or config.num_shared_topk_slots:
            return reference.topk(obj, hidden_states, router_logits, **named)
        weights, ids = with_config(renormalize=False)(obj, hidden_states, router_logits, **named)
        factor = (config.routed_scaling_factor or 1.0) if config.apply_routed_scaling_factor_on_output else 1.0
        return weights / (weights.sum(-1, keepdim=True) / factor + epsilon), ids

    return topk


def bias_in_bf16(obj: Any, *args: Any, **named: Any) -> Any:
    bias = obj.topk_config.correction_bias
    return with_config(correction_bias=None if bias is None else bias.bfloat16())(obj, *args, **named)


def dropped_groups_at_zero(obj: Any, hidden_states: Any, router_logits: Any, **named: Any) -> Any:
    """As DeepSeek's first code does it: what is dropped is 0, which is more than a choice below it."""
    bias = obj.topk_config.correction_bias
    if obj.topk_config.use_grouped_topk and bias is not None and bool((bias < -1).all()):
        return with_config(topk_group=obj.topk_config.num_expert_group)(obj, hidden_states, router_logits, **named)
    return reference.topk(obj, hidden_states, router_logits, **named)


def shared_expert_of_padding(obj: Any, hidden_states: Any, router_logits: Any, **named: Any) -> Any:
    weights, ids = reference.topk(obj, hidden_states, router_logits, **named)
    if obj.topk_config.num_shared_topk_slots:
        ids[:, -1] = router_logits.shape[1]
    return weights, ids


@pytest.mark.parametrize(
    ("fn", "checks", "expected"),
    [
        (with_config(renormalize=False), (SERVING,), "topk_weights (torch.float32)"),
        (with_config(correction_bias=None), (SERVING,), "others score higher"),
        (with_config(num_expert_group=1, topk_group=1), (SERVING,), "others score higher"),
        (with_config(routed_scaling_factor=None), (SERVING,), "topk_weights (torch.float32)"),
        (with_config(fused_shared_experts_scaling_factor=None), (UNUSUAL,), "shared_factor=0.5"),
        (weighted_by_the_biased_scores, (SERVING,), "topk_weights (torch.float32)"),
        (sum_plus(1e-8), (SPECIAL,), "topk_weights (torch.float32)"),
        (sum_plus(0.0), (SPECIAL,), "topk_weights (torch.float32)"),
        (bias_in_bf16, (UNUSUAL,), "offset=-8: token"),
        (dropped_groups_at_zero, (UNUSUAL,), "topk_group=4 offset=-8: token"),
        (shared_expert_of_padding, (UNUSUAL,), "topk_ids of padding are not all -1"),
        (padding_forgotten, (SERVING,), "topk_ids of padding are not all -1"),
        (after(lambda weights, ids: (weights.bfloat16().float(), ids)), (SERVING,), "topk_weights (torch.float32)"),
        (after(lambda weights, ids: (weights, ids.long())), (SERVING,), "topk_ids is torch.int64, not torch.int32"),
        (after(lambda weights, ids: (weights.bfloat16(), ids)), (SERVING,), "topk_weights is torch.bfloat16"),
        (after(lambda weights, ids: (weights, ids.roll(1, 0))), (SERVING,), ""),
        (after(lambda weights, ids: (weights, ids[:, :1].expand_as(ids).contiguous())), (SERVING,), "an expert twice"),
        (after(lambda weights, ids: (weights.flip(-1), ids)), (SERVING,), "topk_weights (torch.float32)"),
        (after(lambda weights, ids: (weights, ids + 1000)), (SERVING,), "not within the 128 experts"),
        (after(lambda weights, ids: (weights[:, :-1], ids)), (SERVING,), "topk_weights has shape"),
        (after(lambda weights, ids: (weights, ids.repeat(1, 2)[:, : ids.shape[1]])), (SERVING,), "topk_ids is not contiguous"),
        (after(lambda weights, ids: weights), (SERVING,), "returned 1 results"),
        (after(lambda weights, ids: (weights, ids.flip(-1))), (UNUSUAL,), "the last of topk_ids is not the shared expert"),
    ],
)
def test_a_mistake_in_routing_is_found(fn: Function, checks: tuple[str, ...], expected: str) -> None:
    found = failures("topk", fn, *checks)
    assert any(expected in line for line in found), found


def test_columns_may_stand_in_any_order() -> None:
    def turned(obj: Any, *args: Any, **named: Any) -> Any:
        weights, ids = reference.topk(obj, *args, **named)
        shared = obj.topk_config.num_shared_topk_slots
        routed = [x[:, : x.shape[1] - shared].flip(-1) for x in (weights, ids)]
        return tuple(torch.cat((x, whole[:, x.shape[1] :]), -1) for x, whole in zip(routed, (weights, ids), strict=True))

    assert failures("topk", turned, SERVING, UNUSUAL, SPECIAL, INPUTS) == []


def experts_with(change: Callable[[Any, Any], tuple[Any, Any]]) -> Function:
    """The reference, on a layer and a dispatch output that ``change`` has made of those given."""

    def fused_moe(obj: Any, layer: Any, dispatch_output: Any) -> Any:
        names = ("w13_weight", "w2_weight", "w13_weight_bias", "w2_weight_bias", "moe_runner_config")
        given = SimpleNamespace(**{name: getattr(layer, name, None) for name in names})
        routed = SimpleNamespace(**vars(dispatch_output.topk_output))
        output = SimpleNamespace(hidden_states=dispatch_output.hidden_states, topk_output=routed)
        return reference.fused_moe(obj, *change(given, output))

    return fused_moe


def halves_swapped(layer: Any, output: Any) -> tuple[Any, Any]:
    if layer.moe_runner_config.is_gated:
        layer.w13_weight = torch.cat(layer.w13_weight.chunk(2, 1)[::-1], 1)
    return layer, output


def weights_dropped(layer: Any, output: Any) -> tuple[Any, Any]:
    output.topk_output.topk_weights = torch.ones_like(output.topk_output.topk_weights)
    return layer, output


def weights_of_fp32_only(layer: Any, output: Any) -> tuple[Any, Any]:
    return (layer, output) if output.topk_output.topk_weights.dtype is torch.float32 else weights_dropped(layer, output)


def weights_made_to_add_up_to_one(layer: Any, output: Any) -> tuple[Any, Any]:
    weights = output.topk_output.topk_weights
    output.topk_output.topk_weights = weights / weights.sum(-1, keepdim=True)
    return layer, output


def negative_ids_from_the_end(layer: Any, output: Any) -> tuple[Any, Any]:
    output.topk_output.topk_ids = output.topk_output.topk_ids.long() % layer.w13_weight.shape[0]
    return layer, output


def negative_ids_of_weight_zero(layer: Any, output: Any) -> tuple[Any, Any]:
    """As a kernel that computes the first expert for them, and multiplies with nothing."""
    ids = output.topk_output.topk_ids
    output.topk_output.topk_weights = torch.where(ids < 0, 0.0, output.topk_output.topk_weights)
    output.topk_output.topk_ids = ids.clamp_min(0)
    return layer, output


def bias_dropped(layer: Any, output: Any) -> tuple[Any, Any]:
    layer.w2_weight_bias = None
    return layer, output


def config_with(**changes: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    def change(layer: Any, output: Any) -> tuple[Any, Any]:
        layer.moe_runner_config = SimpleNamespace(**{**vars(layer.moe_runner_config), **changes})
        return layer, output

    return change


@pytest.mark.parametrize(
    ("change", "checks", "expected"),
    [
        (halves_swapped, (SERVING,), "result (torch.bfloat16)"),
        (weights_dropped, (SERVING,), "result (torch.bfloat16)"),
        (weights_made_to_add_up_to_one, (UNUSUAL,), "total=2.5"),
        (weights_of_fp32_only, (UNUSUAL,), "own_weights"),
        (negative_ids_from_the_end, (SERVING,), "elsewhere=0.5"),
        (negative_ids_of_weight_zero, (SPECIAL,), "nan-in-padding"),
        (bias_dropped, (UNUSUAL,), "bias: "),
        (config_with(activation="silu"), (UNUSUAL,), "activation=relu2 not_gated"),
        (config_with(apply_router_weight_on_input=False), (UNUSUAL,), "weight_on_input"),
    ],
)
def test_a_mistake_in_experts_is_found(change: Callable[[Any, Any], tuple[Any, Any]], checks: tuple[str, ...], expected: str) -> None:
    found = failures("fused_moe", experts_with(change), *checks)
    assert any(expected in line for line in found), found


def test_sums_in_bf16_are_found() -> None:
    def fused_moe(obj: Any, layer: Any, dispatch_output: Any) -> Any:
        x, routed = dispatch_output.hidden_states, dispatch_output.topk_output
        out = torch.zeros_like(x)
        for column in range(routed.topk_ids.shape[1]):
            ids = routed.topk_ids[:, column].long()
            one = SimpleNamespace(topk_ids=ids.unsqueeze(-1), topk_weights=routed.topk_weights[:, column : column + 1])
            out = out + reference.fused_moe(obj, layer, SimpleNamespace(hidden_states=x, topk_output=one))
            out = (out * 1.01).to(x.dtype)
        return out

    assert failures("fused_moe", fused_moe, SERVING)


def test_roundings_of_a_tensor_cores_inputs_are_allowed() -> None:
    """As kernels do it: the results of both products, the activation's and each expert's are rounded to bf16."""

    def fused_moe(obj: Any, layer: Any, dispatch_output: Any) -> Any:
        config, x, routed = layer.moe_runner_config, dispatch_output.hidden_states, dispatch_output.topk_output
        out = torch.zeros(x.shape)
        for expert in range(layer.w13_weight.shape[0]):
            rows, columns = (routed.topk_ids == expert).nonzero(as_tuple=True)
            hidden = functional.linear(x[rows], layer.w13_weight[expert])
            if config.is_gated:
                gate, up = hidden.float().chunk(2, -1)
                hidden = (functional.silu(gate) * up).to(x.dtype)
            y = functional.linear(hidden.float(), layer.w2_weight[expert].float()) * routed.topk_weights[rows, columns].unsqueeze(-1)
            out.index_add_(0, rows, y.to(x.dtype).float())
        return out.to(x.dtype)

    impl = Implementation("fused_moe", fused_moe, None, torch.device("cpu"))
    for case in cases_of("fused_moe", None, torch.device("cpu"), quick=True):
        if case.check == INPUTS:
            assert check_case(impl, case, secrets.randbits(31)).status == OK


@pytest.mark.parametrize(
    ("shared", "wrong", "op", "fn"),
    [
        (shared_moe.Routing, {"scale": 1.0}, "topk", reference.topk),
        (shared_moe.Routing, {"shared_weight": None}, "topk", reference.topk),
        (shared_moe.Experts, {"weight_on_input": False}, "fused_moe", reference.fused_moe),
    ],
)
def test_a_mistake_in_what_the_backends_share_is_found(
    monkeypatch: pytest.MonkeyPatch, shared: Any, wrong: dict[str, Any], op: str, fn: Function
) -> None:
    """How a configuration is read is the backends' common code; what is expected of them must not be read with it."""
    read = shared.of
    monkeypatch.setattr(shared, "of", lambda config: read(config)._replace(**wrong))
    assert failures(op, fn, UNUSUAL)
