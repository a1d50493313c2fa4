# SPDX-License-Identifier: Apache-2.0
import torch
from sglang.kernels.ops.attention.rope import apply_rope_inplace

#: Where a cos tensor keeps (its sin tensor, the two as one).
_JOINED = "_sglang_fl_joined"


def joined(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``[max_position, rotary_dim]``, cos and sin side by side, as the kernel reads them.

    Nothing is copied where they are the halves of one tensor, as SGLang's are; that view is kept with cos.
    """
    kept = cos.__dict__.get(_JOINED)
    if kept is not None and kept[0] is sin:
        return kept[1]
    half = cos.shape[1]
    if (
        sin.dtype == cos.dtype
        and cos.stride() == sin.stride() == (2 * half, 1)
        and cos.untyped_storage().data_ptr() == sin.untyped_storage().data_ptr()
        and sin.storage_offset() == cos.storage_offset() + half
    ):
        both = cos.as_strided((cos.shape[0], 2 * half), (2 * half, 1))
        cos.__dict__[_JOINED] = (sin, both)
        return both
    return torch.cat((cos, sin), dim=-1)


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
