# SPDX-License-Identifier: Apache-2.0
from functools import lru_cache
from typing import Any

import torch
import triton

from ....types import Refusal
from ...rotary import Rotated, mrotary_by
from ..kernels.rotary import rotary_kernel
from .launch import launch

#: How many pairs of numbers a program turns, and with how many warps.
_PAIRS, _WARPS = 1024, 4


@lru_cache
def tile(half: int) -> tuple[int, int, int]:
    """(rows, pairs, warps) of a program."""
    block = triton.next_power_of_2(half)
    return max(1, _PAIRS // block), block, _WARPS


_NO_SECTIONS = (None, None, None, None)


def _rotated(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inplace: bool,
    sections: tuple[Any, ...] = _NO_SECTIONS,
) -> Rotated:
    # PyTorch 2.14's Inductor drops what is written to one of two views of a tensor.
    inplace = inplace and not torch.compiler.is_compiling()
    tokens, query_heads, head_dim = query.shape
    key_heads, half = key.shape[1], cos.shape[1]
    rest = head_dim - 2 * half
    if rest < 0:
        raise Refusal(f"{op}: rotary_dim {2 * half} exceeds head_dim {head_dim}")
    query_out, key_out = (None, None) if inplace else (query.new_empty(query.shape), key.new_empty(key.shape))
    if tokens:
        if cos.stride(1) != 1 or cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        if positions.stride(-1) != 1:
            positions = positions.contiguous()
        rows, block, warps = tile(half)
        programs = triton.cdiv(tokens * query_heads, rows) + triton.cdiv(tokens * key_heads, rows)
        launch(
            rotary_kernel,
            (programs,),
            query,
            key,
            cos,
            sin,
            positions,
            query_out,
            key_out,
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            cos.stride(0),
            positions.stride(0),
            tokens,
            query_heads,
            key_heads,
            head_dim,
            half,
            interleaved,
            *sections,
            rows,
            block,
            triton.next_power_of_2(rest) if rest else 0,
            warps=warps,
        )
    return (query, key) if query_out is None or key_out is None else (query_out, key_out)


def rotary_embedding(
    obj: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    rotary_interleaved: bool = False,
    inplace: bool = True,
) -> Rotated:
    return _rotated("rotary_embedding", query, key, cos, sin, position_ids, rotary_interleaved, inplace)


def _by_sections(
    obj: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> Rotated:
    sections = (*obj.mrope_section, obj.mrope_interleaved)
    return _rotated("mrotary_embedding", query, key, cos, sin, positions, not obj.is_neox_style, True, sections)


mrotary_embedding = mrotary_by(rotary_embedding, _by_sections)
