# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from .base import Forward
from .causal_conv1d import PADDING, CausalConv1dBridge, ConvolutionContext, activation_of
from .gated_delta_rule import check_pool, check_tokens


class CausalConv1dUpdateBridge(CausalConv1dBridge):
    """The convolution in decode, and in the verification of drafted tokens."""

    op = "causal_conv1d_update"

    def trial(self, subject: Any, context: ConvolutionContext, fn: Forward) -> None:
        """One token each of three sequences, one without a slot."""
        x, weight = context.scratch(3, context.dim), context.scratch(context.dim, context.width)
        pool = context.pool()
        out = fn(x, pool, weight, weight[:, 0], context.activation, context.integers(2, PADDING, 0))
        check_tokens(out, x, slice(None, None, 2))
        check_pool(pool, context.pool(), written=[0, 2])

    @staticmethod
    def arguments(
        x: torch.Tensor,
        conv_state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: Any = None,
        cache_seqlens: torch.Tensor | None = None,
        conv_state_indices: torch.Tensor | None = None,
        num_accept_tokens: torch.Tensor | None = None,
        intermediate_conv_window: torch.Tensor | None = None,
        intermediate_state_indices: torch.Tensor | None = None,
        retrieve_next_token: torch.Tensor | None = None,
        retrieve_next_sibling: torch.Tensor | None = None,
        retrieve_parent_token: torch.Tensor | None = None,
        pad_slot_id: int | None = PADDING,
        metadata: Any = None,
        validate_data: bool = False,
    ) -> tuple[Any, ...] | None:
        if cache_seqlens is not None or num_accept_tokens is not None or pad_slot_id != PADDING:
            return None
        return (
            *(x, conv_state, weight, bias, activation_of(activation), conv_state_indices),
            *(intermediate_conv_window, intermediate_state_indices),
            *(retrieve_next_token, retrieve_next_sibling, retrieve_parent_token),
        )
