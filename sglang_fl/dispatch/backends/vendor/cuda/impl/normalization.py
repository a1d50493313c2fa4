# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import torch
from flashinfer.norm import layernorm
from sgl_kernel import fused_add_rmsnorm, gemma_fused_add_rmsnorm, gemma_rmsnorm, rmsnorm

from .....types import Refusal
from ....checks import check_hidden_size

Normed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_Kernel = Callable[..., Any]


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, weight_dtype: torch.dtype) -> None:
    if weight.dtype != weight_dtype:
        raise Refusal(f"{op}: with x in {x.dtype} the kernel needs weights in {weight_dtype}; they are {weight.dtype}")
    check_hidden_size(op, x, weight)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``[rows, hidden_size]`` with the last dimension contiguous, as the kernels want it."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _normalized(op: str, plain: _Kernel, added: _Kernel, obj: Any, x: torch.Tensor, residual: torch.Tensor | None) -> Normed:
    weight, eps = obj.weight, obj.variance_epsilon
    _check(op, x, weight, x.dtype)
    if not x.numel():
        return torch.empty_like(x) if residual is None else (x, residual)
    rows = _rows(x)
    if residual is None:
        return plain(rows, weight, eps).view(x.shape)
    sums = _rows(residual)
    added(rows, sums, weight, eps)
    return rows.view(x.shape), sums.view(x.shape)


def gemma_rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    return _normalized("gemma_rms_norm", gemma_rmsnorm, gemma_fused_add_rmsnorm, obj, x, residual)


def layer_norm(obj: Any, x: torch.Tensor) -> torch.Tensor:
    _check("layer_norm", x, obj.weight, torch.float32)
    if not x.numel():
        return torch.empty_like(x)
    # FlashInfer loads 16 bytes at once, from wherever a row begins.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return layernorm(rows, obj.weight.contiguous(), obj.bias.contiguous(), obj.variance_epsilon).view(x.shape)


def rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    return _normalized("rms_norm", rmsnorm, fused_add_rmsnorm, obj, x, residual)
