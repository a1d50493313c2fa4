# SPDX-License-Identifier: Apache-2.0
from functools import lru_cache

import torch
import triton

from ....types import Refusal
from ...checks import heads_of_packed
from ..kernels.gated_delta_rule import packed_decode_kernel
from .launch import launch

#: How many numbers of a head's state a program updates, and with how many warps. Several would exchange q, k and the gates through shared
#: memory, and wait for each other 11 times; one warp has 32 numbers a thread here, and 28 such programs fit on an SM of Hopper.
_NUMBERS, _WARPS = 1024, 1


@lru_cache
def tile(key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program: whole rows, since all of a row is summed."""
    block = triton.next_power_of_2(key_dim)
    return max(1, min(triton.next_power_of_2(value_dim), _NUMBERS // block)), block, _WARPS


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
    """In place."""
    op = "fused_recurrent_gated_delta_rule_packed_decode"
    heads = heads_of_packed(op, mixed_qkv, initial_state)
    value_heads, value_dim, key_dim = initial_state.shape[1:]
    if initial_state.stride()[1:] != (value_dim * key_dim, key_dim, 1):
        raise Refusal(f"{op}: the kernel supports a pool whose slots are contiguous; its strides are {initial_state.stride()}")
    if batch := len(mixed_qkv):
        rows, block, warps = tile(key_dim, value_dim)
        launch(
            packed_decode_kernel,
            (batch * value_heads * triton.cdiv(value_dim, rows),),
            mixed_qkv,
            a,
            b,
            A_log.contiguous(),
            dt_bias.contiguous(),
            initial_state,
            out,
            ssm_state_indices,
            scale,
            mixed_qkv.stride(0),
            a.stride(0),
            b.stride(0),
            initial_state.stride(0),
            ssm_state_indices.stride(0),
            heads,
            value_heads,
            key_dim,
            value_dim,
            use_qk_l2norm_in_kernel,
            rows,
            block,
            warps=warps,
        )
    return out, initial_state
