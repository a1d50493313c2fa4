# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from .base import Forward, Routes, check_pair, check_result
from .gated_delta_rule import GatedDeltaContext, GatedDeltaRuleBridge, check_pool


class ChunkGatedDeltaRuleBridge(GatedDeltaRuleBridge):
    """Prefill of SGLang's linear attention."""

    op = "chunk_gated_delta_rule"
    captured = False  # SGLang breaks prefill graphs at linear attention
    kernel = "extend_kernel"

    def trial(self, subject: Any, context: GatedDeltaContext, fn: Forward) -> None:
        """Three sequences, one of more than a chunk, one without a slot."""
        tokens, heads, value_heads = 69, context.heads, context.value_heads
        q, v = context.scratch(1, tokens, heads, context.key_dim), context.scratch(1, tokens, value_heads, context.value_dim)
        gate = context.scratch32(1, tokens, value_heads).abs()
        slots, ends = context.integers(2, 0, -1), context.integers(0, 66, 68, tokens)
        pool = context.pool(3)
        scale = context.key_dim**-0.5
        result = fn(q, q.flip(1), v, -gate, 1 - gate / 2, scale, pool, slots, ends, True, True)
        if isinstance(result, tuple) and len(result) == 3 and result[1] is None:  # as SGLang's own gives them
            result = result[0], result[2]
        out, chunks = check_pair(result, "(o, chunk states)")
        check_result("o", out, v)
        check_result("the chunk states", chunks, q, (1, 4, *pool.shape[1:]))
        check_pool(pool, context.pool(3), written=[0, 2])

    @staticmethod
    def arguments(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        initial_state_indices: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        head_first: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        inplace_update: bool = True,
    ) -> tuple[Any, ...] | None:
        if head_first:
            return None
        # FlagOS's vendors are always given a number.
        number = k.shape[-1] ** -0.5 if scale is None else scale
        states = initial_state, initial_state_indices, cu_seqlens
        return q, k, v, g, beta, number, *states, use_qk_l2norm_in_kernel, inplace_update

    def forward(self, routes: Routes) -> Forward:
        run = super().forward(routes)

        def forward(hook: Any, /, *args: Any, **kwargs: Any) -> Any:
            result = run(hook, *args, **kwargs)
            return result[0], None, result[-1]  # as SGLang's own gives them

        # As SGLang's own function is, one that torch.compile runs as it is.
        return torch.compiler.disable(forward)
