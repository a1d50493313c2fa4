# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from .base import TRIAL_TOKENS, Forward, ModelContext, Routes, check_pair, check_result, scratch
from .layer import Layer, LayerBridge

UNKNOWN_HEADS = (4, 2)
#: SGLang's forwards that return new tensors.
OUT_OF_PLACE = frozenset({"forward_native", "forward_npu"})
#: Where a layer keeps (its cos_sin_cache, the cos half, the sin half).
_HALVES = "_sglang_fl_cos_sin"


def cos_sin(layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The halves of a layer's ``cos_sin_cache``, as views that last until SGLang replaces the cache.

    Returns:
        (cache ``[max_position, rotary_dim]``, cos and sin ``[max_position, rotary_dim / 2]``).
    """
    cache = layer._buffers["cos_sin_cache"]
    assert cache is not None
    cos, sin = cache.chunk(2, dim=-1)
    halves = (cache, cos, sin)
    layer.__dict__[_HALVES] = halves
    return halves


def cache_reason(layer: Layer) -> str | None:
    """Why the operators cannot read a layer's ``cos_sin_cache``, or None."""
    cache = layer._buffers.get("cos_sin_cache")
    if cache is None or cache.dim() != 2 or cache.is_complex() or cache.shape[1] != layer.rotary_dim:
        return "its cos_sin_cache is not [max_position, rotary_dim]"
    return None


class RotaryEmbeddingBridge(LayerBridge):
    """SGLang's RotaryEmbedding: ``forward(positions, query, key, offsets, fused_set_kv_buffer_arg)``."""

    op = "rotary_embedding"
    shared = True

    def attribute_reason(self, layer: Layer) -> str | None:
        if reason := cache_reason(layer):
            return reason
        return "it reads sin_cos_cache instead of positions" if hasattr(layer, "sin_cos_cache") else None

    def trial_key(self, layer: Layer, context: ModelContext) -> tuple[Any, ...]:
        return context.heads, layer.head_size, layer.rotary_dim, layer.is_neox_style, layer.cos_sin_cache.dtype

    def trial(self, layer: Layer, context: ModelContext, fn: Forward) -> None:
        query, key = (scratch(context, TRIAL_TOKENS, heads, layer.head_size) for heads in context.heads or UNKNOWN_HEADS)
        _, cos, sin = cos_sin(layer)
        positions = torch.arange(TRIAL_TOKENS, device=context.device) % cos.shape[0]
        in_place = layer._resolve_forward_method().__name__ not in OUT_OF_PLACE
        result = fn(layer, query.clone(), key.clone(), cos, sin, positions, not layer.is_neox_style, in_place)
        check_query_and_key(result, query, key)

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own, contexts, divert, failed = routes
        # Where SGLang's own forward writes query and key in place, some of its models rely on that
        # and do not look at the result (models/llama4.py); where it does not, one may give a tensor as both, or keep it.
        in_place = own.__name__ not in OUT_OF_PLACE

        def forward(
            self: Layer,
            positions: torch.Tensor,
            query: torch.Tensor,
            key: torch.Tensor,
            offsets: torch.Tensor | None = None,
            fused_set_kv_buffer_arg: Any = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if fused_set_kv_buffer_arg is not None:
                # The model relies on SGLang's kernel to write the KV cache as well.
                return own(self, positions, query, key, offsets, fused_set_kv_buffer_arg)
            if contexts.active:
                return divert(self, positions, query, key, offsets)
            if dtypes is not None and query.dtype not in dtypes:
                return own(self, positions, query, key, offsets)
            state = self.__dict__
            halves = state.get(_HALVES)
            if halves is None or halves[0] is not state["_buffers"]["cos_sin_cache"]:
                halves = cos_sin(self)
            rows = (positions if offsets is None else positions + offsets).flatten()
            head_size = state["head_size"]
            args = (
                self,
                _by_head(query, rows.shape[0], head_size),
                _by_head(key, rows.shape[0], head_size),
                halves[1],
                halves[2],
                rows,
                not state["is_neox_style"],
                in_place,
            )
            try:
                rotated = fn(*args)
            except Exception as error:
                rotated = failed(self, error, args, (positions, query, key, offsets))
            if in_place:
                return write_back(query, args[1], rotated[0]), write_back(key, args[2], rotated[1])
            return rotated[0].reshape(query.shape), rotated[1].reshape(key.shape)

        return forward


def check_query_and_key(result: Any, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless ``result`` is a pair like these."""
    rotated = check_pair(result, "(query, key)")
    check_result("its query", rotated[0], query)
    check_result("its key", rotated[1], key)


def write_back(given: torch.Tensor, by_head: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
    """``given``, holding the result; nothing is copied if the implementation wrote it there, whatever view of it it returns."""
    if rotated is not by_head or by_head.data_ptr() != given.data_ptr():
        rotated = rotated.reshape(given.shape)
        if not _is_the_same_memory(rotated, given):
            given.copy_(rotated)
    return given


def _is_the_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of tensors of one shape. The stride of a dimension of one element says nothing: a view may have any."""
    return one.data_ptr() == other.data_ptr() and all(
        size == 1 or mine == others for size, mine, others in zip(one.shape, one.stride(), other.stride(), strict=True)
    )


def _by_head(x: torch.Tensor, num_tokens: int, head_size: int) -> torch.Tensor:
    """``[num_tokens, heads, head_size]``; without tokens the number of heads must be worked out."""
    return x.reshape(num_tokens, -1 if num_tokens else x.shape[1:].numel() // head_size, head_size)
