# SPDX-License-Identifier: Apache-2.0
"""A backend as FlagOS's vendors write one: each operator with the parameters, and the results, of their plugins.

What computes is the reference, looked up at each call.
"""

from typing import Any

import torch

from sglang_fl.dispatch import BackendImplKind, OpImpl, OpRegistry
from sglang_fl.dispatch.backends.reference.impl import activation, gated_delta_rule, moe, normalization, rotary


def silu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return activation.silu_and_mul(obj, x)


def rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return normalization.rms_norm(obj, x, residual)


def gemma_rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return normalization.gemma_rms_norm(obj, x, residual)


def rotary_embedding(
    obj: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    rotary_interleaved: bool = False,
    inplace: bool = True,
) -> Any:
    return rotary.rotary_embedding(obj, query, key, cos, sin, position_ids, rotary_interleaved, inplace)


def mrotary_embedding(obj: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
    return rotary.mrotary_embedding(obj, positions, query, key)


def topk(
    obj: Any,
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    *,
    num_token_non_padded: torch.Tensor | None = None,
    expert_location_dispatch_info: Any = None,
) -> Any:
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    weights, ids = moe.topk(obj, hidden_states, router_logits, num_token_non_padded=num_token_non_padded)
    return StandardTopKOutput(weights, ids, router_logits)


def fused_moe(obj: Any, layer: Any, dispatch_output: Any) -> Any:
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

    return StandardCombineInput(hidden_states=moe.fused_moe(obj, layer, dispatch_output))


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> Any:
    assert isinstance(scale, float) and head_first is False
    states = initial_state, initial_state_indices, cu_seqlens
    o, h = gated_delta_rule.chunk_gated_delta_rule(q, k, v, g, beta, scale, *states, use_qk_l2norm_in_kernel)
    return o, None, h


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
    ssm_state_indices: torch.Tensor | None,
    num_accepted_tokens: torch.Tensor | None,
    use_qk_l2norm_in_kernel: bool,
) -> Any:
    assert ssm_state_indices is None and num_accepted_tokens is None
    states = initial_state, output_final_state, cu_seqlens
    return gated_delta_rule.fused_recurrent_gated_delta_rule(q, k, v, g, beta, scale, *states, use_qk_l2norm_in_kernel)


def fused_recurrent_gated_delta_rule_packed_decode(**named: Any) -> Any:
    """Its parameters cannot be read: they are given by name."""
    return gated_delta_rule.fused_recurrent_gated_delta_rule_packed_decode(**named)


FUNCTIONS = (
    *(silu_and_mul, rms_norm, gemma_rms_norm, rotary_embedding, mrotary_embedding, topk, fused_moe),
    *(chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, fused_recurrent_gated_delta_rule_packed_decode),
)


def register_builtins(registry: OpRegistry) -> None:
    for function in FUNCTIONS:
        registry.register_impl(OpImpl(function.__name__, "vendor.field", BackendImplKind.VENDOR, function, vendor="field", priority=100))
