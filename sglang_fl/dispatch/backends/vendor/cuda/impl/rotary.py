# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import torch
from sglang.kernels.ops.attention.rope import apply_rope_inplace
from sglang.kernels.ops.attention.rotary_triton import triton_mrope_fused

from ....cos_sin import joined


def _refuse_all_but_fp32(cos: torch.Tensor) -> None:
    if cos.dtype != torch.float32:
        raise TypeError(f"a rotary embedding on CUDA needs cos and sin in fp32, and they are {cos.dtype}")


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    interleaved: bool,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _refuse_all_but_fp32(cos)
    if not inplace:
        query, key = query.clone(memory_format=torch.contiguous_format), key.clone(memory_format=torch.contiguous_format)
    elif query.stride(1) != key.stride(1):
        query, key = query.contiguous(), key.contiguous()
    if not query.numel():
        return query, key
    rotary_dim = 2 * cos.shape[-1]
    if not interleaved and rotary_dim % 4:
        raise ValueError(f"rotary_embedding: by halves the kernel rotates multiples of 4 numbers, and these are {rotary_dim}")
    whole = rotary_dim == query.shape[-1]
    apply_rope_inplace(
        query if whole else query[..., :rotary_dim],
        key if whole else key[..., :rotary_dim],
        joined(cos, sin),
        position_ids.contiguous(),
        is_neox=not interleaved,
    )
    return query, key


def mrotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    axis_map: torch.Tensor,
    mrope_section: Sequence[int],
    mrope_interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place. SGLang's kernel works in the dtype of cos and sin, and reads a row of positions as it lies."""
    _refuse_all_but_fp32(cos)
    if not query.shape[0]:
        return query, key
    tokens, _, head_size = query.shape
    flat = tuple(x.reshape(tokens, x.shape[1] * head_size) for x in (query, key))
    cache = joined(cos, sin)
    triton_mrope_fused(
        *flat,
        cache,
        positions if positions.stride(1) == 1 else positions.contiguous(),
        mrope_section,
        head_size,
        cache.shape[1],
        mrope_interleaved,
        False,
        not interleaved,
        None,
    )
    return flat[0].view(query.shape), flat[1].view(key.shape)
