# SPDX-License-Identifier: Apache-2.0
"""FlagGems's kernels of flash-linear-attention, put together for pools of states of SGLang's layout.

Two of them are not called as FlagGems calls them. Its kernel that solves a chunk's triangle together with what comes
before writes that to memory and reads it back in other threads, with nothing to make them wait; the two kernels that it
was made of are right, and are run here. And its recurrent function goes by the number of tokens: up to 64 it takes states
``[K, V]`` and writes the slot before the pool for a slot of -1, above ``[V, K]``, and leaves out -1. States here are
``[V, K]``, so it is always given more than 64 tokens; those behind the last sequence cost nothing.
"""

from importlib import import_module

import torch
from torch.nn import functional

from ...batches import MOST_BLOCKS, decode_in_parts
from ...checks import check_chunk_kernel, slots_of, split_packed
from ...state_pool import read, write
from ..library import load

load()
_FLA = "flag_gems.fused.FLA"
chunk_local_cumsum = import_module(f"{_FLA}.cumsum").chunk_local_cumsum
chunk_scaled_dot_kkt_fwd = import_module(f"{_FLA}.chunk_scaled_dot_kkt").chunk_scaled_dot_kkt_fwd
solve_triangle = import_module(f"{_FLA}.solve_tril").merge_16x16_to_64x64_inverse_kernel
recompute_w_u_fwd = import_module(f"{_FLA}.wy_fast").recompute_w_u_fwd
chunk_gated_delta_rule_fwd_h = import_module(f"{_FLA}.chunk_delta_h").chunk_gated_delta_rule_fwd_h
chunk_fwd_o = import_module(f"{_FLA}.chunk_o").chunk_fwd_o
prepare_chunk_indices = import_module(f"{_FLA}.index").prepare_chunk_indices
fused_recurrent_gated_delta_rule_fwd = import_module(f"{_FLA}.fused_recurrent").fused_recurrent_gated_delta_rule_fwd

_CHUNK, _LEAST_TOKENS = 64, 65


def _normed(x: torch.Tensor) -> torch.Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


# torch.compile cannot trace FlagGems's tuner. In a model it does not get here: the bridge's forward is left out of it, as SGLang's own is.
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
    op = "chunk_gated_delta_rule"
    check_chunk_kernel(op, q, v)
    key_dim, value_heads, value_dim = q.shape[3], v.shape[2], v.shape[3]
    count = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    slots = slots_of(op, initial_state_indices, count, q.device)
    if not q.numel():
        return v.new_empty(v.shape), q.new_empty((q.shape[0], 0, value_heads, value_dim, key_dim))
    if use_qk_l2norm_in_kernel:
        q, k = _normed(q), _normed(k)
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g.float(), beta))
    # The kernels' states are [K, V].
    states = None if initial_state is None else read(initial_state, slots, torch.float32).transpose(-1, -2).contiguous()
    sums = chunk_local_cumsum(g, _CHUNK, cu_seqlens=cu_seqlens)
    triangle = _solved(chunk_scaled_dot_kkt_fwd(k, sums, beta, cu_seqlens, _CHUNK), cu_seqlens, k.dtype)
    w, u = recompute_w_u_fwd(k, v, beta, sums, triangle, cu_seqlens)
    keep = initial_state is not None and inplace_update
    chunks, updates, last = chunk_gated_delta_rule_fwd_h(
        k, w, u, sums, initial_state=states, output_final_state=keep, chunk_size=_CHUNK, cu_seqlens=cu_seqlens
    )
    out = chunk_fwd_o(q, k, updates, chunks, sums, key_dim**-0.5 if scale is None else scale, cu_seqlens, _CHUNK)
    if keep and initial_state is not None:
        write(initial_state, slots, last.transpose(-1, -2))
    return out, chunks.transpose(-1, -2)


def _solved(triangle: torch.Tensor, cu_seqlens: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """``(I + A) ** -1`` of each chunk's strictly lower triangle A, ``[B, T, HV, 64]``.

    FlagGems's own function would have the kernel make TMA descriptors, for which nobody gives it memory.
    """
    rows, tokens, value_heads, size = triangle.shape
    indices = None if cu_seqlens is None else prepare_chunk_indices(cu_seqlens, size)
    chunks = -(-tokens // size) if indices is None else len(indices)
    solved = torch.zeros_like(triangle, dtype=dtype)
    solve_triangle[chunks, rows * value_heads](
        A=triangle,
        Ai=solved,
        cu_seqlens=cu_seqlens,
        chunk_indices=indices,
        T=tokens,
        H=value_heads,
        BT=size,
        USE_TMA=False,
        DOT_PRECISION="ieee",
    )
    return solved


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
    batch = len(mixed_qkv)
    if batch * initial_state.shape[1] > MOST_BLOCKS:
        arguments = mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel
        return decode_in_parts(fused_recurrent_gated_delta_rule_packed_decode, *arguments)
    q, k, v = split_packed("fused_recurrent_gated_delta_rule_packed_decode", _padded(mixed_qkv), initial_state)
    if not batch:
        return out, initial_state
    g = -A_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    q, k, v, g, beta = (x.contiguous().unsqueeze(0) for x in (q, k, v, _padded(g), _padded(b.float().sigmoid())))
    o, _ = fused_recurrent_gated_delta_rule_fwd(
        q, k, v, g, beta, scale, initial_state, True, ends, ssm_state_indices, None, use_qk_l2norm_in_kernel
    )
    # The kernel writes nothing for padding.
    out.copy_(o[0, :batch].masked_fill((ssm_state_indices < 0)[:, None, None], 0).unsqueeze(1))
    return out, initial_state


def _padded(x: torch.Tensor) -> torch.Tensor:
    """At least as many tokens as the kernel for states [V, K] is run for; those that are added belong to no sequence."""
    missing = _LEAST_TOKENS - len(x)
    return x if missing <= 0 else torch.cat((x, x.new_zeros((missing, *x.shape[1:]))))
