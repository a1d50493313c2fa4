# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule as the recurrence that it is: token after token, in fp32."""

from itertools import pairwise

import torch
from torch.nn import functional

from ... import state_pool
from ...checks import check_heads, slots_of, split_packed

CHUNK = 64


def step(
    state: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token.

    Args:
        state: ``[..., HV, V, K]``.
        q, k: ``[..., HV, K]``.
        v: ``[..., HV, V]``.
        decay, beta: ``[..., HV]``.

    Returns:
        The new state, and ``o`` ``[..., HV, V]``.
    """
    state = state * decay[..., None, None]
    wrong_by = v - _times(state, k)
    state = state + (beta[..., None] * wrong_by)[..., None] * k[..., None, :]
    return state, _times(state, q)


def _times(state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``state @ x``, summed in fp32 on every device: a matrix product may be rounded to less."""
    return (state * x[..., None, :]).sum(-1)


def _normed(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, use_qk_l2norm: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in fp32, each with HV heads; q times the scale."""
    heads, value_heads = q.shape[-2], v.shape[-2]
    check_heads("gated delta rule", heads, value_heads)
    q, k = q.float(), k.float()
    if use_qk_l2norm:
        q, k = _normed(q), _normed(k)
    q, k = (x.repeat_interleave(value_heads // heads, -2) for x in (q * scale, k))
    return q, k, v.float()


def _sequences(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """(row, first token, end) of each sequence."""
    rows, tokens = q.shape[:2]
    if cu_seqlens is None:
        return [(row, 0, tokens) for row in range(rows)]
    if rows != 1:
        raise ValueError(f"gated delta rule: with cu_seqlens all sequences are in one row, and q has {rows}")
    ends = cu_seqlens.tolist()
    return [(0, start, end) for start, end in pairwise(ends)]


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    """The pool is written when all else is done."""
    sequences = _sequences(q, cu_seqlens)
    states = q.new_zeros((len(sequences), v.shape[2], v.shape[3], k.shape[3]), dtype=torch.float32)
    if initial_state is not None:
        initial_state_indices = slots_of("chunk_gated_delta_rule", initial_state_indices, len(sequences), q.device)
        states = state_pool.read(initial_state, initial_state_indices, torch.float32)
    out, chunks, last = _run(q, k, v, g, beta, scale, use_qk_l2norm_in_kernel, sequences, states)
    if initial_state is not None and initial_state_indices is not None and inplace_update and last:
        state_pool.write(initial_state, initial_state_indices, torch.stack(last))
    chunk_states = torch.stack(chunks) if chunks else states.new_empty((0, *states.shape[1:]))
    return out, chunk_states.to(q.dtype).view(q.shape[0], -1, *states.shape[1:])


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    sequences = _sequences(q, cu_seqlens)
    shape = (len(sequences), v.shape[2], v.shape[3], k.shape[3])
    if initial_state is not None and tuple(initial_state.shape) != shape:
        raise ValueError(f"fused_recurrent_gated_delta_rule: the states are {tuple(initial_state.shape)}, not {shape}")
    states = q.new_zeros(shape, dtype=torch.float32) if initial_state is None else initial_state.float()
    if beta is None:
        beta = torch.ones_like(g)
    out, _, last = _run(q, k, v, g, beta, scale, use_qk_l2norm_in_kernel, sequences, states)
    if not output_final_state:
        return out, None
    return out, torch.stack(last) if last else states


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None,
    use_qk_l2norm: bool,
    sequences: list[tuple[int, int, int]],
    states: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """``o`` in q's dtype, the state before each chunk, and each sequence's last state."""
    out = q.new_zeros(v.shape)
    chunks, last = list[torch.Tensor](), list[torch.Tensor]()
    q, k, v = _heads(q, k, v, k.shape[-1] ** -0.5 if scale is None else scale, use_qk_l2norm)
    decay, beta = g.float().exp(), beta.float()
    for state, (row, start, end) in zip(states, sequences, strict=True):
        for token in range(start, end):
            if (token - start) % CHUNK == 0:
                chunks.append(state)
            at = row, token
            state, out[at] = step(state, q[at], k[at], v[at], decay[at], beta[at])
        last.append(state.clone() if start == end else state)
    return out, chunks, last


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
    """``out`` and the pool are written when all else is done; without a word to the host, so that graphs can hold it."""
    q, k, v = split_packed("fused_recurrent_gated_delta_rule_packed_decode", mixed_qkv, initial_state)
    if tuple(out.shape) != (len(mixed_qkv), 1, *v.shape[1:]):
        raise ValueError(f"fused_recurrent_gated_delta_rule_packed_decode: out is {tuple(out.shape)}")
    q, k, v = _heads(q, k, v, scale, use_qk_l2norm_in_kernel)
    decay = torch.exp(-A_log.float().exp() * functional.softplus(a.float() + dt_bias.float()))
    states = state_pool.read(initial_state, ssm_state_indices, torch.float32)
    states, o = step(states, q, k, v, decay, b.float().sigmoid())
    o = o.masked_fill((ssm_state_indices < 0)[:, None, None], 0)
    state_pool.write(initial_state, ssm_state_indices, states)
    out.copy_(o.unsqueeze(1))
    return out, initial_state


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    """Without a word to the host, so that graphs can hold it: only the device knows which token belongs to which sequence."""
    rows, tokens = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, rows * tokens + 1, max(1, tokens), device=q.device)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    slots = slots_of("fused_sigmoid_gating_delta_rule_update", initial_state_indices, len(starts), q.device)
    out = q.new_zeros(v.shape)
    if not out.numel():
        return out
    q, k, v = (x.flatten(0, 1) for x in _heads(q, k, v, k.shape[-1] ** -0.5 if scale is None else scale, use_qk_l2norm_in_kernel))
    gate = functional.softplus(a.float() + dt_bias.float(), softplus_beta, softplus_threshold)
    decay, beta = (x.reshape(v.shape[:2]) for x in (torch.exp(-A_log.float().exp() * gate), b.float().sigmoid()))
    places = torch.arange(len(q), device=q.device)
    sequence = torch.searchsorted(ends, places, right=True)
    # Behind the last sequence there may be padding.
    real, sequence = sequence < len(starts), sequence.clamp(max=len(starts) - 1)
    index = places - starts[sequence]
    before = places - 1
    if retrieve_parent_token is not None:
        before = starts[sequence] + retrieve_parent_token[sequence, index.clamp(max=retrieve_parent_token.shape[1] - 1)]
    before = torch.where(index == 0, len(q) + sequence, before.clamp(0, len(q) - 1))
    # The state after each token, and behind them the one before each sequence.
    states = torch.cat((v.new_empty(len(q), *initial_state_source.shape[1:]), state_pool.read(initial_state_source, slots, torch.float32)))
    for token, o in enumerate(out.flatten(0, 1)):
        at = slice(token, token + 1)
        states[at], o[:] = step(states.index_select(0, before[at]), q[at], k[at], v[at], decay[at], beta[at])
    out.masked_fill_(~real.view(rows, tokens, 1, 1), 0)
    if intermediate_states_buffer is not None and intermediate_state_indices is not None:
        row = torch.where(real, intermediate_state_indices[sequence], -1)
        place = torch.where(row < 0, -1, row * intermediate_states_buffer.shape[1] + index)
        state_pool.write(intermediate_states_buffer.view(-1, *states.shape[1:]), place, states[: len(q)])
    if not disable_state_update:
        last = torch.where(ends > starts, ends - 1, len(q) + torch.arange(len(starts), device=q.device))
        state_pool.write(initial_state_source, slots, states[last])
    return out
