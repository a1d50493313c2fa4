# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from .base import Forward, Routes, check_pair, check_result
from .gated_delta_rule import GatedDeltaContext, GatedDeltaRuleBridge


class FusedRecurrentGatedDeltaRuleBridge(GatedDeltaRuleBridge):
    """Token after token. Nothing in SGLang 0.5.23 calls it; a model from elsewhere may."""

    op = "fused_recurrent_gated_delta_rule"

    def trial(self, subject: Any, context: GatedDeltaContext, fn: Forward) -> None:
        tokens, heads, value_heads = 5, context.heads, context.value_heads
        q, v = context.scratch(1, tokens, heads, context.key_dim), context.scratch(1, tokens, value_heads, context.value_dim)
        gate = context.scratch32(1, tokens, value_heads).abs()
        ends = torch.tensor([0, 4, tokens], dtype=torch.int32, device=context.device)
        states = context.scratch32(2, value_heads, context.value_dim, context.key_dim)
        out, last = check_pair(fn(q, q.flip(1), v, -gate, 1 - gate / 2, None, states, True, ends, True), "(o, last states)")
        check_result("o", out, v)
        check_result("the last states", last, states)

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own = routes.fn, routes.dtypes, routes.own
        contexts, divert, failed = routes.contexts, routes.divert, routes.failed

        def forward(
            self: Any,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            g: torch.Tensor,
            beta: torch.Tensor | None = None,
            scale: float | None = None,
            initial_state: torch.Tensor | None = None,
            output_final_state: bool = False,
            cu_seqlens: torch.Tensor | None = None,
            use_qk_l2norm_in_kernel: bool = False,
        ) -> Any:
            args = (q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel)
            if contexts.active:
                return divert(self, *args)
            # SGLang's takes a beta for each number of v, too.
            if (beta is not None and beta.dim() == v.dim()) or (dtypes is not None and q.dtype not in dtypes):
                return own(self, *args)
            try:
                return fn(*args)
            except Exception as error:
                return failed(self, error, args, args)

        return forward
