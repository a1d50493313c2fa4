# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from functools import partial

import torch

from .form import Form, Forms, Tensors, nbytes

_MAX_POSITION = 8192
#: The hidden size at which the rarer forms are measured.
_ONE_HIDDEN = 4096


def rotary_embedding(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    forms = [("", 128, True)]
    if hidden == _ONE_HIDDEN:
        forms += [("interleaved", 128, False), ("head_dim 64", 64, True)]

    def inputs(head_dim: int, tokens: int) -> Tensors:
        # Views of the packed projection, as models hand them over.
        kv_hidden = max(1, hidden // head_dim // 4) * head_dim
        packed = torch.randn(tokens, hidden + 2 * kv_hidden, dtype=dtype, device=device)
        query, key, _ = packed.split([hidden, kv_hidden, kv_hidden], dim=-1)
        return torch.arange(tokens, device=device) % _MAX_POSITION, query, key

    def moved(head_dim: int, tensors: Tensors) -> int:
        positions, query, key = tensors
        return nbytes(positions) + 2 * nbytes(query, key) + positions.numel() * head_dim * 4

    for variant, head_dim, neox in forms:
        layer = partial(RotaryEmbedding, head_dim, head_dim, _MAX_POSITION, 10000, neox, dtype)
        yield Form(variant, layer, partial(inputs, head_dim), partial(moved, head_dim))


FORMS: dict[str, Forms] = {"rotary_embedding": rotary_embedding}
