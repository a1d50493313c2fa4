# SPDX-License-Identifier: Apache-2.0
import torch
from sgl_kernel import fused_add_rmsnorm, rmsnorm


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[rows, hidden_size]`` with the last dimension contiguous, as the kernels want it."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if weight.dtype != x.dtype:
        raise TypeError(f"rms_norm: the kernel reads weights of x's dtype {x.dtype}, and they are {weight.dtype}")
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"rms_norm: hidden_size is {weight.shape[-1]}, the last dimension of x {x.shape[-1]}")
    if not x.numel():
        return torch.empty_like(x) if residual is None else (x, residual)
    rows = _rows(x)
    if residual is None:
        return rmsnorm(rows, weight, eps).view(x.shape)
    sums = _rows(residual)
    fused_add_rmsnorm(rows, sums, weight, eps)
    return rows.view(x.shape), sums.view(x.shape)
