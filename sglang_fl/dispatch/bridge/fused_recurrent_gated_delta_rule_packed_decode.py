# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from .base import Forward, check_pair, check_result
from .gated_delta_rule import GatedDeltaContext, GatedDeltaRuleBridge, check_pool


class PackedDecodeBridge(GatedDeltaRuleBridge):
    """Decode of SGLang's linear attention."""

    op = "fused_recurrent_gated_delta_rule_packed_decode"
    kernel = "decode_kernel"

    def trial(self, subject: Any, context: GatedDeltaContext, fn: Forward) -> None:
        """Three sequences, one without a slot."""
        value_heads, value_dim = context.value_heads, context.value_dim
        mixed = context.scratch(3, 2 * context.heads * context.key_dim + value_heads * value_dim)
        gate, constants = context.scratch(3, value_heads), context.scratch32(value_heads)
        slots = context.integers(2, -1, 0)
        pool, out = context.pool(3), context.scratch(3, 1, value_heads, value_dim)
        result = fn(mixed, gate, -gate, constants, -constants, context.key_dim**-0.5, pool, out, slots, True)
        for what, got, wanted in zip(("out", "the pool"), check_pair(result, "(out, initial_state)"), (out, pool), strict=True):
            if got is not wanted:
                raise ValueError(f"its result is not {what} that it was given")
        check_result("out", out, out)
        if out[1].any():
            raise ValueError("out is not zero for a sequence that is padding")
        check_pool(pool, context.pool(3), written=[0, 2])

    @staticmethod
    def arguments(
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        scale: float,
        initial_state: torch.Tensor,
        out: torch.Tensor,
        ssm_state_indices: torch.Tensor,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> tuple[Any, ...]:
        return mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel
