# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ...rotary import Rotated, mrotary_by
from ..library import load

gems_rope_forward = load().modules.rotary_embedding.gems_rope_forward


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
    """FlagGems's kernel out of place, also where writing is allowed.

    Its in-place kernel reads both numbers of a pair in one thread and writes each in another, with
    nothing that keeps a warp from writing a number before another warp has read it.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim == query.shape[-1]:
        return gems_rope_forward(query, key, cos, sin, position_ids, rotary_interleaved, False)
    # The kernel rotates whole heads; a view of their first part is one.
    rotated = gems_rope_forward(query[..., :rotary_dim], key[..., :rotary_dim], cos, sin, position_ids, rotary_interleaved, False)
    if not inplace:
        query, key = query.clone(), key.clone()
    query[..., :rotary_dim] = rotated[0]
    key[..., :rotary_dim] = rotated[1]
    return query, key


mrotary_embedding = mrotary_by(rotary_embedding)
