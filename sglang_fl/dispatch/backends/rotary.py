# SPDX-License-Identifier: Apache-2.0
"""Helpers for rotary kernels: cos, sin and positions in the layouts that they need. Imports PyTorch."""

from collections.abc import Callable
from typing import Any

import torch

Rotated = tuple[torch.Tensor, torch.Tensor]

#: Where a cos tensor keeps (its sin tensor, the two as one).
_JOINED = "_sglang_fl_joined"


def joined(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``[max_position, rotary_dim]``, cos and sin side by side.

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


def by_axis(
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, axis_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of cos and sin made for each token, for a kernel that knows one position a token only.

    Args:
        cos, sin: ``[max_position, rotary_dim / 2]``.
        positions: ``[3, num_tokens]``.
        axis_map: ``[rotary_dim / 2]``, the row of positions that each pair turns by.

    Returns:
        (cos and sin ``[num_tokens, rotary_dim / 2]``, position_ids ``[num_tokens]`` that count them).
    """
    rows = positions.index_select(0, axis_map).t().long()
    return cos.gather(0, rows), sin.gather(0, rows), torch.arange(positions.shape[1], device=positions.device)


def mrotary_by(rotary: Callable[..., Rotated], sections: Callable[..., Rotated] | None = None) -> Any:
    """The operator ``mrotary_embedding`` by a backend's ``rotary_embedding``, which serves positions of one row.

    Args:
        sections: ``sections(obj, query, key, cos, sin, positions)`` for positions of three rows, query and key by heads and
            possibly written. None: ``rotary`` is given rows of cos and sin made for each token.
    """

    def mrotary_embedding(obj: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Rotated:
        cos, sin = obj.cos_sin_cache.chunk(2, -1)
        by_head = [x.reshape(x.shape[0], x.shape[1:].numel() // obj.head_size, obj.head_size) for x in (query, key)]
        if positions.dim() == 1:
            rotated = rotary(obj, *by_head, cos, sin, positions, not obj.is_neox_style)
        elif sections is None:
            rotated = rotary(obj, *by_head, *by_axis(cos, sin, positions, obj.axis_map), not obj.is_neox_style)
        else:
            rotated = sections(obj, *by_head, cos, sin, positions)
        return rotated[0].reshape(query.shape), rotated[1].reshape(key.shape)

    return mrotary_embedding
