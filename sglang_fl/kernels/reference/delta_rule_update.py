# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule, gates included, over each sequence's next tokens: decode and verification of drafts. In fp32."""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import softplus


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
    **options: Any,
) -> torch.Tensor:
    """q and k [rows, tokens, H, K], v [rows, tokens, HV, V] -> [rows, tokens, HV, V].

    Slot -1 is padding: its state starts at zero and is not saved. ``intermediate_states_buffer`` [slots, steps, HV, V, K] receives
    the state after each token. With ``retrieve_parent_token`` [sequences, steps] a token continues from its parent's state there.
    """
    if given := sorted(name for name, value in options.items() if value not in (None, False)):
        raise NotImplementedError(f"fused_sigmoid_gating_delta_rule_update in plain PyTorch has no {', '.join(given)}")
    group = v.shape[2] // q.shape[2]
    shape, out = v.shape, q.new_zeros(v.shape).flatten(0, 1)
    q, k, v = (x.flatten(0, 1).float() for x in (q, k, v))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(group, 1) for x in (q * (k.shape[-1] ** -0.5 if scale is None else scale), k))
    heads = v.shape[1]
    gate = softplus(a.reshape(-1, heads).float() + dt_bias.float(), softplus_beta, softplus_threshold)
    decay, beta = torch.exp(-A_log.float().exp() * gate), b.reshape(-1, heads).float().sigmoid()

    starts = list(range(0, len(q) + 1, shape[1])) if cu_seqlens is None else cu_seqlens.tolist()
    slots = initial_state_indices.tolist()
    buffer = intermediate_states_buffer
    rows = [-1] * len(slots) if intermediate_state_indices is None else intermediate_state_indices.tolist()
    parents = None if retrieve_parent_token is None else retrieve_parent_token.tolist()
    for sequence, (start, end) in enumerate(pairwise(starts)):
        slot, row = slots[sequence], rows[sequence] if buffer is not None else -1
        state = initial_state_source[max(slot, 0)].float() * (slot >= 0)
        for step, token in enumerate(range(start, end)):
            if parents is not None and step and buffer is not None and row >= 0:
                state = buffer[row, parents[sequence][step]].float()
            state = state * decay[token, :, None, None]
            wrong_by = v[token] - (state * k[token, :, None]).sum(-1)
            state = state + (beta[token, :, None] * wrong_by)[..., None] * k[token, :, None]
            out[token] = (state * q[token, :, None]).sum(-1).to(out.dtype)
            if buffer is not None and row >= 0:
                buffer[row, step] = state.to(buffer.dtype)
        if slot >= 0 and not disable_state_update:
            initial_state_source[slot] = state.to(initial_state_source.dtype)
    return out.view(shape)
