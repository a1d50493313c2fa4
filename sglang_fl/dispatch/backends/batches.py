# SPDX-License-Identifier: Apache-2.0
"""Batches that are too large for one launch of a kernel. Imports PyTorch."""

from collections.abc import Callable
from typing import Any

import torch

#: The largest second or third dimension of a CUDA grid.
MOST_BLOCKS = 65535


def decode_in_parts(
    decode: Callable[..., Any],
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``fused_recurrent_gated_delta_rule_packed_decode`` by a kernel with a block for each head of each sequence."""
    most = MOST_BLOCKS // initial_state.shape[1]
    for first in range(0, len(mixed_qkv), most):
        part = slice(first, first + most)
        rows = mixed_qkv[part], a[part], b[part]
        decode(*rows, A_log, dt_bias, scale, initial_state, out[part], ssm_state_indices[part], use_qk_l2norm_in_kernel)
    return out, initial_state
