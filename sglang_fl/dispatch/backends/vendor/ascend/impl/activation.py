# SPDX-License-Identifier: Apache-2.0
import torch
import torch_npu


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1] // 2
    if 2 * size != x.shape[-1]:
        raise ValueError(f"silu_and_mul: the last dimension holds two halves; it cannot be {x.shape[-1]}")
    return torch_npu.npu_swiglu(x) if x.numel() else x.new_empty((*x.shape[:-1], size))
