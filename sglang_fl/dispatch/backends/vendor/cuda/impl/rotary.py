# SPDX-License-Identifier: Apache-2.0
import torch
from sglang.kernels.ops.attention.rope import apply_rope_inplace

from ....cos_sin import joined


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    interleaved: bool,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if cos.dtype != torch.float32:
        raise TypeError(f"rotary_embedding: the kernel reads cos and sin in fp32, and they are {cos.dtype}")
    if not inplace:
        query, key = query.clone(memory_format=torch.contiguous_format), key.clone(memory_format=torch.contiguous_format)
    elif query.stride(1) != key.stride(1):
        query, key = query.contiguous(), key.contiguous()
    if not query.numel():
        return query, key
    rotary_dim = 2 * cos.shape[-1]
    whole = rotary_dim == query.shape[-1]
    apply_rope_inplace(
        query if whole else query[..., :rotary_dim],
        key if whole else key[..., :rotary_dim],
        joined(cos, sin),
        position_ids.contiguous(),
        is_neox=not interleaved,
    )
    return query, key
