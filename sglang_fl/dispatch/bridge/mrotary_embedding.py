# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from .base import TRIAL_TOKENS, Forward, ModelContext, Routes, scratch
from .layer import Layer, LayerBridge
from .rotary_embedding import OUT_OF_PLACE, UNKNOWN_HEADS, cache_reason, check_query_and_key, write_back


class MRotaryEmbeddingBridge(LayerBridge):
    """SGLang's MRotaryEmbedding: ``forward(positions, query, key, fused_set_kv_buffer_arg)``."""

    op = "mrotary_embedding"
    shared = True

    def attribute_reason(self, layer: Layer) -> str | None:
        if reason := cache_reason(layer):
            return reason
        if layer.mrope_interleaved_glm:
            return "mrope_interleaved_glm, on which SGLang's own forwards disagree"
        if layer.mrope_section and (layer.axis_map is None or layer.axis_map.shape != (layer.rotary_dim // 2,)):
            return "its axis_map does not say which position each pair turns by"
        return None

    def trial_key(self, layer: Layer, context: ModelContext) -> tuple[Any, ...]:
        sections = tuple(layer.mrope_section or ())
        size = context.heads, layer.head_size, layer.rotary_dim, layer.is_neox_style, layer.cos_sin_cache.dtype
        return *size, sections, layer.mrope_interleaved

    def trial(self, layer: Layer, context: ModelContext, fn: Forward) -> None:
        positions = torch.arange(TRIAL_TOKENS, device=context.device) % layer.cos_sin_cache.shape[0]
        for given in (positions, positions.expand(3, -1)) if layer.mrope_section else (positions,):
            query, key = (scratch(context, TRIAL_TOKENS, heads * layer.head_size) for heads in context.heads or UNKNOWN_HEADS)
            result = fn(layer, given, query.clone(), key.clone())
            check_query_and_key(result, query, key)

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own, contexts, divert, failed = routes
        # SGLang's kernels for sections write query and key in place.
        in_place = own.__name__ not in OUT_OF_PLACE

        def forward(
            self: Layer,
            positions: torch.Tensor,
            query: torch.Tensor,
            key: torch.Tensor,
            fused_set_kv_buffer_arg: Any = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if fused_set_kv_buffer_arg is not None:
                return own(self, positions, query, key, fused_set_kv_buffer_arg)
            if contexts.active:
                return divert(self, positions, query, key)
            if dtypes is not None and query.dtype not in dtypes:
                return own(self, positions, query, key)
            try:
                rotated = fn(self, positions, query, key)
            except Exception as error:
                rotated = failed(self, error, (self, positions, query, key), (positions, query, key))
            if in_place and positions.dim() == 2:
                return write_back(query, query, rotated[0]), write_back(key, key, rotated[1])
            return rotated

        return forward
