# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import torch

from ...cos_sin import by_axis
from ..library import load

gems_rope_forward = load().modules.rotary_embedding.gems_rope_forward


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor,
    interleaved: bool,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlagGems's kernel out of place, also where writing is allowed.

    Its in-place kernel reads both numbers of a pair in one thread and writes each in another, with
    nothing that keeps a warp from writing a number before another warp has read it.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim == query.shape[-1]:
        return gems_rope_forward(query, key, cos, sin, position_ids, interleaved, False)
    # The kernel rotates whole heads; a view of their first part is one.
    rotated = gems_rope_forward(query[..., :rotary_dim], key[..., :rotary_dim], cos, sin, position_ids, interleaved, False)
    if not inplace:
        query, key = query.clone(), key.clone()
    query[..., :rotary_dim] = rotated[0]
    key[..., :rotary_dim] = rotated[1]
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
    """FlagGems has no kernel for sections; its plain one is given rows of cos and sin made for each token."""
    return rotary_embedding(query, key, *by_axis(cos, sin, positions, axis_map), interleaved, True)
