# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from functools import partial

import torch

from .form import Form, Forms, Tensors, nbytes

_MAX_POSITION = 8192
#: The hidden size at which the rarer forms are measured.
_ONE_HIDDEN = 4096


def _packed(tokens: int, hidden: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Query and key as views of the packed projection, as models hand them over."""
    kv_hidden = max(1, hidden // head_dim // 4) * head_dim
    packed = torch.randn(tokens, hidden + 2 * kv_hidden, dtype=dtype, device=device)
    query, key, _ = packed.split([hidden, kv_hidden, kv_hidden], dim=-1)
    return query, key


def _moved(head_dim: int, tensors: Tensors) -> int:
    positions, query, key = tensors
    return nbytes(positions) + 2 * nbytes(query, key) + positions.shape[-1] * head_dim * 4


def rotary_embedding(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    forms = [("", 128, True)]
    if hidden == _ONE_HIDDEN:
        forms += [("interleaved", 128, False), ("head_dim 64", 64, True)]

    def inputs(head_dim: int, tokens: int) -> Tensors:
        return torch.arange(tokens, device=device) % _MAX_POSITION, *_packed(tokens, hidden, head_dim, dtype, device)

    for variant, head_dim, neox in forms:
        layer = partial(RotaryEmbedding, head_dim, head_dim, _MAX_POSITION, 10000, neox, dtype)
        yield Form(variant, layer, partial(inputs, head_dim), partial(_moved, head_dim))


def mrotary_embedding(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.rotary_embedding.mrope import MRotaryEmbedding

    forms = [("", [16, 24, 24], False)]
    if hidden == _ONE_HIDDEN:
        forms += [("sections interleaved", [24, 20, 20], True)]

    def inputs(tokens: int) -> Tensors:
        rows = torch.arange(3 * tokens, device=device).view(3, tokens) % _MAX_POSITION
        return rows, *_packed(tokens, hidden, 128, dtype, device)

    for variant, sections, interleaved in forms:
        layer = partial(MRotaryEmbedding, 128, 128, _MAX_POSITION, 10000, True, dtype, sections, interleaved)
        yield Form(variant, layer, inputs, partial(_moved, 128))


FORMS: dict[str, Forms] = {"mrotary_embedding": mrotary_embedding, "rotary_embedding": rotary_embedding}
