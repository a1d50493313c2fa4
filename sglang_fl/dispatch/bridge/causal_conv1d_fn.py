# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from .base import Forward
from .causal_conv1d import PADDING, CausalConv1dBridge, ConvolutionContext, activation_of
from .gated_delta_rule import check_pool, check_tokens


class CausalConv1dFnBridge(CausalConv1dBridge):
    """The convolution in prefill."""

    op = "causal_conv1d_fn"
    captured = False  # SGLang breaks prefill graphs at linear attention

    def trial(self, subject: Any, context: ConvolutionContext, fn: Forward) -> None:
        """Three sequences: one has no slot, and one is shorter than the kernel."""
        x, weight = context.scratch(8, context.dim).T, context.scratch(context.dim, context.width)
        pool, slots, ends = context.pool(), context.integers(2, PADDING, 0), context.integers(0, 5, 7, 8)
        go_on = torch.tensor([True, False, True], device=context.device)
        out = fn(x, weight, weight[:, 0], pool, ends, [5, 2, 1], slots, go_on, context.activation)
        check_tokens(out, x, (slice(None), [0, 1, 2, 3, 4, 7]))
        check_pool(pool, context.pool(), written=[0, 2])

    @staticmethod
    def arguments(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        conv_states: torch.Tensor | None,
        query_start_loc: torch.Tensor,
        seq_lens_cpu: list[int],
        cache_indices: torch.Tensor | None = None,
        has_initial_state: torch.Tensor | None = None,
        activation: Any = "silu",
        pad_slot_id: int | None = PADDING,
        validate_data: bool = False,
        block_table: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[Any, ...] | None:
        if conv_states is None or block_table is not None or pad_slot_id != PADDING:
            return None
        sequences = query_start_loc, seq_lens_cpu, cache_indices, has_initial_state
        return x, weight, bias, conv_states, *sequences, activation_of(activation)
