# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
import torch_npu

from ....checks import check_hidden_size

Normed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def gemma_rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    weight, eps = obj.weight, obj.variance_epsilon
    check_hidden_size("gemma_rms_norm", x, weight)
    if not x.numel():
        return torch.empty_like(x) if residual is None else (x, residual)
    if residual is None and weight.dtype == x.dtype:
        return torch_npu.npu_gemma_rms_norm(x.contiguous(), weight.contiguous(), eps)[0]
    # No fused operator adds a residual and 1 + weight in fp32.
    hidden = x.float() if residual is None else x.float() + residual
    normed = torch_npu.npu_gemma_rms_norm(hidden.contiguous(), weight.float().contiguous(), eps)[0].to(x.dtype)
    return normed if residual is None else (normed, hidden.to(x.dtype))


def layer_norm(obj: Any, x: torch.Tensor) -> torch.Tensor:
    weight, bias, eps = obj.weight, obj.bias, obj.variance_epsilon
    check_hidden_size("layer_norm", x, weight)
    if not x.numel():
        return torch.empty_like(x)
    if weight.dtype != x.dtype:
        normed = torch_npu.npu_layer_norm_eval(x.float(), [x.shape[-1]], weight.float(), bias.float(), eps)
        return normed.to(x.dtype)
    return torch_npu.npu_layer_norm_eval(x, [x.shape[-1]], weight, bias, eps)


def rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    weight, eps = obj.weight, obj.variance_epsilon
    if weight.dtype != x.dtype:
        raise TypeError(f"rms_norm: torch_npu normalises {x.dtype} with weights of the same dtype, and they are {weight.dtype}")
    check_hidden_size("rms_norm", x, weight)
    if not x.numel():
        return torch.empty_like(x) if residual is None else (x, residual)
    if residual is None:
        return torch_npu.npu_rms_norm(x, weight, eps)[0]
    normed, _, total = torch_npu.npu_add_rms_norm(x, residual, weight, eps)
    return normed, total
