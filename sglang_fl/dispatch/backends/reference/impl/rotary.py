# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ...rotary import Rotated, mrotary_by


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the pairs of the last dimension, in fp32.

    Args:
        x: ``[num_tokens, heads, rotary_dim]``.
        cos, sin: ``[num_tokens, 1, rotary_dim / 2]``, fp32.
    """
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    first, second = first.float(), second.float()
    rotated = first * cos - second * sin, second * cos + first * sin
    return torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)


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
    """Never in place, whatever is allowed."""
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > query.shape[-1]:
        raise ValueError(f"rotary_embedding: rotary_dim {rotary_dim} exceeds head_dim {query.shape[-1]}")
    rows_cos = cos.index_select(0, position_ids).unsqueeze(1).float()
    rows_sin = sin.index_select(0, position_ids).unsqueeze(1).float()

    def embed(x: torch.Tensor) -> torch.Tensor:
        rotated = rotate(x[..., :rotary_dim], rows_cos, rows_sin, rotary_interleaved).to(x.dtype)
        return rotated if rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)

    return embed(query), embed(key)


mrotary_embedding = mrotary_by(rotary_embedding)
