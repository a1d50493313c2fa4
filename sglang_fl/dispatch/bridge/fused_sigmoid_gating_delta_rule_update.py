# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from .base import Forward, check_result
from .gated_delta_rule import GatedDeltaContext, GatedDeltaRuleBridge, check_pool

#: softplus's beta and threshold in SGLang's layers.
_SOFTPLUS = (1.0, 20.0)


class SigmoidGatingUpdateBridge(GatedDeltaRuleBridge):
    """Verifies drafted tokens in SGLang's linear attention, and decodes where the packed decode kernel is not used."""

    op = "fused_sigmoid_gating_delta_rule_update"
    kernel = "verify_kernel"
    activations = 5

    def trial(self, subject: Any, context: GatedDeltaContext, fn: Forward) -> None:
        """One token each of three sequences, one without a slot. Then two drafted tokens each of two sequences; the pool is not updated."""
        heads, value_heads = context.heads, context.value_heads
        tokens = 4
        q, v = context.scratch(1, tokens, heads, context.key_dim), context.scratch(1, tokens, value_heads, context.value_dim)
        gates, constants = context.scratch(tokens, value_heads), context.scratch32(value_heads)
        slots, ends = context.integers(2, -1, 0), context.integers(0, 1, 2, 3)
        pool = context.pool(3)
        decoded = (x[:, :3] for x in (q, q.flip(1), v))
        out = fn(constants, gates[:3], -constants, *_SOFTPLUS, *decoded, -gates[:3], pool, slots, None, True, ends)
        check_result("o", out[:, ::2] if isinstance(out, torch.Tensor) else out, v[:, :3:2])
        check_pool(pool, context.pool(3), written=[0, 2])
        states = torch.stack([context.pool(2)] * 3)
        rows, ends = context.integers(2, 0), context.integers(0, 2, tokens)
        pool, drafts = context.pool(3), (q, q.flip(1), v)
        out = fn(constants, gates, -constants, *_SOFTPLUS, *drafts, -gates, pool, slots[::2], None, True, ends, True, states, rows, 2, None)
        check_result("o", out, v)
        check_pool(pool, context.pool(3), written=[])
        check_pool(states, torch.stack([context.pool(2)] * 3), written=[0, 2])

    @staticmethod
    def arguments(
        A_log: torch.Tensor,
        a: torch.Tensor,
        dt_bias: torch.Tensor,
        softplus_beta: float,
        softplus_threshold: float,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        b: torch.Tensor,
        initial_state_source: torch.Tensor,
        initial_state_indices: torch.Tensor,
        scale: float | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        is_kda: bool = False,
        lower_bound: float | None = None,
        disable_state_update: bool = False,
        intermediate_states_buffer: torch.Tensor | None = None,
        intermediate_state_indices: torch.Tensor | None = None,
        cache_steps: int | None = None,
        retrieve_parent_token: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[Any, ...] | None:
        # Kimi's delta attention has other gates. Arguments that are not named above select other ways to store states.
        if is_kda or lower_bound is not None or others or (softplus_beta, softplus_threshold) != _SOFTPLUS:
            return None
        return (
            *(A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source, initial_state_indices),
            *(scale, use_qk_l2norm_in_kernel, cu_seqlens),
            *(disable_state_update, intermediate_states_buffer, intermediate_state_indices, cache_steps, retrieve_parent_token),
        )
