# SPDX-License-Identifier: Apache-2.0
from functools import lru_cache
from typing import Any

import torch
import triton

from ...checks import check_hidden_size
from ..kernels.normalization import norm_kernel
from .launch import launch

Normed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

#: How many numbers of a row stay in registers; more are read twice.
_LONGEST = 16384
#: Short rows are taken several at once, until a program has as many numbers.
_NUMBERS = 1024


@lru_cache
def tile(size: int, added: bool) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program."""
    block = min(_LONGEST, triton.next_power_of_2(size))
    rows = max(1, _NUMBERS // block)
    numbers_of_a_thread = 8 if block <= 2048 else 64 if block > 4096 and added else 32
    return rows, block, max(1, rows * block // (32 * numbers_of_a_thread))


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """``[rows, size]``, rows apart from each other and contiguous; x's own memory where it is so already."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _normed(op: str, plus_one: bool, obj: Any, x: torch.Tensor, residual: torch.Tensor | None) -> Normed:
    weight = obj.weight
    check_hidden_size(op, x, weight)
    by_row, added = _by_row(x), None if residual is None else _by_row(residual)
    out = x.new_empty(x.shape) if added is None else by_row
    rows, size = by_row.shape
    if rows:
        rows_at_once, block, warps = tile(size, added is not None)
        launch(
            norm_kernel,
            (triton.cdiv(rows, rows_at_once),),
            by_row,
            added,
            weight.contiguous(),
            out,
            by_row.stride(0),
            0 if added is None else added.stride(0),
            rows,
            obj.variance_epsilon,
            size,
            plus_one,
            rows_at_once,
            block,
            warps=warps,
        )
    return out if added is None else (by_row.view(x.shape), added.view(x.shape))


def gemma_rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    """In place where there is a residual."""
    return _normed("gemma_rms_norm", True, obj, x, residual)


def rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    """In place where there is a residual."""
    return _normed("rms_norm", False, obj, x, residual)
