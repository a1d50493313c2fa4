# SPDX-License-Identifier: Apache-2.0
from functools import lru_cache
from typing import Any

import torch
import triton

from ...checks import half_of
from ..kernels.activation import activation_kernel
from .launch import launch

#: How many numbers of the result a program computes, at most, and with how many warps.
_NUMBERS, _WARPS = 1024, 4
#: A program takes fewer columns if a row's last one would otherwise have more than an eighth of them all to spare; no fewer than these,
#: of which a program takes several rows where a row has less.
_LEAST_COLUMNS = 256


@lru_cache
def tile(size: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program."""
    block = min(_NUMBERS, triton.next_power_of_2(size))
    while block > _LEAST_COLUMNS and -size % block * 8 > size:
        block //= 2
    return max(1, _LEAST_COLUMNS // block), block, max(1, _WARPS * block // _NUMBERS)


def activate_and_mul(activation: str, x: torch.Tensor) -> torch.Tensor:
    """The activation of the first half of the last dimension, times the second."""
    size = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], size))
    if not out.numel():
        return out
    by_row = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if by_row.stride(1) != 1:
        by_row = by_row.contiguous()
    rows = by_row.shape[0]
    rows_at_once, block, warps = tile(size)
    grid = (triton.cdiv(rows, rows_at_once), triton.cdiv(size, block))
    launch(activation_kernel, grid, by_row, out, by_row.stride(0), rows, activation, size, rows_at_once, block, warps=warps)
    return out


def gelu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    half_of("gelu_and_mul", x)
    return activate_and_mul("gelu_tanh" if obj.approximate == "tanh" else "gelu", x)


def silu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    half_of("silu_and_mul", x)
    return activate_and_mul("silu", x)
