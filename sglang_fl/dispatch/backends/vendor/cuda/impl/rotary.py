# SPDX-License-Identifier: Apache-2.0
import math
from functools import lru_cache
from typing import Any

import torch
from sglang.kernels.ops.attention.rope import apply_rope_inplace
from sglang.kernels.ops.attention.rotary_triton import triton_mrope_fused

from .....types import Refusal
from ....checks import check_offsets
from ....rotary import Rotated, joined, mrotary_by


def _refuse_all_but_fp32(cos: torch.Tensor) -> None:
    if cos.dtype != torch.float32:
        raise Refusal(f"a rotary embedding on CUDA needs cos and sin in fp32; they are {cos.dtype}")


@lru_cache
def _bytes_at_once(rotary_dim: int, itemsize: int, by_halves: bool) -> int:
    """How many bytes a thread of SGLang's kernel reads and writes at once (kernels/jit/csrc/elementwise/rope.cuh)."""
    threads = _power_of_two(rotary_dim // math.gcd(16 // itemsize, rotary_dim))
    return 2 * itemsize * _power_of_two(math.ceil(rotary_dim / (2 * threads * (1 + by_halves))))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _is_at_steps_of(x: torch.Tensor, step: int) -> bool:
    """Whether every head of ``[tokens, heads, head_size]`` begins at a multiple of so many bytes."""
    return not (x.data_ptr() | x.stride(0) * x.itemsize | x.stride(1) * x.itemsize) % step


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
    _refuse_all_but_fp32(cos)
    rotary_dim = 2 * cos.shape[-1]
    step = _bytes_at_once(rotary_dim, query.itemsize, not rotary_interleaved)
    as_they_lie = inplace and query.stride(1) == key.stride(1) and _is_at_steps_of(query, step) and _is_at_steps_of(key, step)
    if not as_they_lie:
        query, key = query.clone(memory_format=torch.contiguous_format), key.clone(memory_format=torch.contiguous_format)
    if not query.numel():
        return query, key
    if not rotary_interleaved and rotary_dim % 4:
        raise Refusal(f"rotary_embedding: with neox style the kernel rotates multiples of 4 numbers; rotary_dim is {rotary_dim}")
    if not as_they_lie and not _is_at_steps_of(query, step):
        raise Refusal(f"rotary_embedding: the kernel takes {step} bytes at once, and heads of {query.shape[-1]} do not begin at multiples")
    whole = rotary_dim == query.shape[-1]
    apply_rope_inplace(
        query if whole else query[..., :rotary_dim],
        key if whole else key[..., :rotary_dim],
        joined(cos, sin),
        position_ids.contiguous(),
        is_neox=not rotary_interleaved,
    )
    return query, key


# PyTorch 2.14's Inductor drops what a Triton kernel writes to one of two views of a tensor, and cannot compile this one with any
# number of tokens.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_sections(
    obj: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> Rotated:
    """In place. SGLang's kernel works in the dtype of cos and sin, and reads a row of positions as it lies."""
    _refuse_all_but_fp32(cos)
    tokens, _, head_size = query.shape
    if not tokens:
        return query, key
    check_offsets("mrotary_embedding", tokens, max(query.stride(0), key.stride(0)))
    flat = tuple(x.reshape(tokens, x.shape[1] * head_size) for x in (query, key))
    cache = joined(cos, sin)
    triton_mrope_fused(
        *flat,
        cache,
        positions if positions.stride(1) == 1 else positions.contiguous(),
        obj.mrope_section,
        head_size,
        cache.shape[1],
        obj.mrope_interleaved,
        False,
        obj.is_neox_style,
        None,
    )
    return flat[0].view(query.shape), flat[1].view(key.shape)


mrotary_embedding = mrotary_by(rotary_embedding, _by_sections)
