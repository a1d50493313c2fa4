# SPDX-License-Identifier: Apache-2.0
"""SGLang's own Triton kernels, below the hooks that call this backend: a hook in its place would call itself."""

from functools import partial
from inspect import unwrap

import torch
from sglang.kernels.ops.attention.fla import fused_recurrent
from sglang.kernels.ops.attention.fla.chunk import ChunkGatedDeltaRuleFunction
from sglang.kernels.ops.attention.linear import fused_sigmoid_gating_recurrent

from ....batches import MOST_BLOCKS, decode_in_parts
from ....checks import check_chunk_kernel, check_heads, slots_of
from ....state_pool import read, write

# In a partial: a hook is put wherever a module holds the function itself.
_packed_decode = partial(unwrap(fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode))
_update = partial(unwrap(fused_sigmoid_gating_recurrent.fused_sigmoid_gating_delta_rule_update))


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "chunk_gated_delta_rule"
    check_chunk_kernel(op, q, v)
    count = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    initial_state_indices = slots_of(op, initial_state_indices, count, q.device)
    pool, update = initial_state, inplace_update and initial_state is not None
    if pool is None:
        pool = q.new_zeros((count, v.shape[2], v.shape[3], k.shape[3]), dtype=torch.float32)
    elif not pool.is_contiguous():
        # The kernel's wrapper would update a copy. Its own copy, then: of the slots that are used.
        slots = torch.arange(count, dtype=torch.int32, device=q.device)
        states = read(pool, initial_state_indices, pool.dtype)
        result = chunk_gated_delta_rule(q, k, v, g, beta, scale, states, slots, cu_seqlens, use_qk_l2norm_in_kernel, update)
        if update:
            write(pool, initial_state_indices, states)
        return result
    if not q.numel():
        return v.new_empty(v.shape), q.new_empty((q.shape[0], 0, *pool.shape[1:]))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    return ChunkGatedDeltaRuleFunction.apply(
        q, k, v, g, beta, scale, pool, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel, update
    )


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not mixed_qkv.numel():
        return out, initial_state
    arguments = mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel
    if len(mixed_qkv) * initial_state.shape[1] > MOST_BLOCKS:
        return decode_in_parts(_packed_decode, *arguments)
    return _packed_decode(*arguments)


def fused_sigmoid_gating_delta_rule_update(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
) -> torch.Tensor:
    check_heads("fused_sigmoid_gating_delta_rule_update", q.shape[2], v.shape[2])
    if not q.numel():
        return v.new_empty(v.shape)
    return _update(
        *(A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source, initial_state_indices),
        scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
        disable_state_update=disable_state_update,
        intermediate_states_buffer=intermediate_states_buffer,
        intermediate_state_indices=intermediate_state_indices,
        cache_steps=cache_steps,
        retrieve_parent_token=retrieve_parent_token,
    )
