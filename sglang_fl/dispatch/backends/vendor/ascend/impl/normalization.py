# SPDX-License-Identifier: Apache-2.0
import torch
import torch_npu


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if weight.dtype != x.dtype:
        raise TypeError(f"rms_norm: torch_npu normalises {x.dtype} with weights of the same dtype, and they are {weight.dtype}")
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"rms_norm: hidden_size is {weight.shape[-1]}, the last dimension of x {x.shape[-1]}")
    if not x.numel():
        return torch.empty_like(x) if residual is None else (x, residual)
    if residual is None:
        return torch_npu.npu_rms_norm(x, weight, eps)[0]
    normed, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, eps)
    return normed, total
