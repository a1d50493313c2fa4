# SPDX-License-Identifier: Apache-2.0
"""Reads routing and experts from SGLang's configurations, and builds the operators ``topk`` and ``fused_moe`` from functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
#: What is added to a token's weights before they are divided by their sum.
RENORMALIZE_EPSILON = 1e-20


class Routing(NamedTuple):
    """How experts are selected and weighted; see :meth:`sglang_fl.dispatch.ops.FLBackendBase.topk`.

    Attributes:
        top_k: experts that a token is routed to.
        scoring: softmax or sigmoid.
        groups, topk_group: the groups of experts and how many of them are kept; 1 and 1 without groups.
        scale: what the weights are multiplied by in the end.
        shared_weight: the weight of the column behind them, None if there is none.
    """

    top_k: int
    scoring: str
    renormalize: bool
    groups: int
    topk_group: int
    scale: float
    shared_weight: float | None

    @classmethod
    def of(cls, config: Any) -> Routing:
        """Read off SGLang's TopKConfig."""
        factor = config.routed_scaling_factor
        applied = config.apply_routed_scaling_factor_on_output
        grouped = config.use_grouped_topk
        shared: float | None = None
        if config.num_shared_topk_slots:
            shared = 1.0 if applied or not factor else 1.0 / factor
            if config.fused_shared_experts_scaling_factor is not None:
                shared *= config.fused_shared_experts_scaling_factor
        return cls(
            config.top_k - config.num_shared_topk_slots,
            "sigmoid" if grouped and config.correction_bias is not None else config.scoring_func,
            config.renormalize,
            config.num_expert_group if grouped else 1,
            config.topk_group if grouped else 1,
            factor if applied and factor is not None else 1.0,
            shared,
        )

    def check(self, num_experts: int, correction_bias: torch.Tensor | None) -> None:
        """Raises ValueError for an invalid routing."""
        if self.scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"topk: scoring_func is softmax or sigmoid, not {self.scoring!r}")
        if num_experts % self.groups:
            raise ValueError(f"topk: {num_experts} experts cannot be divided into {self.groups} equal groups")
        kept = num_experts // self.groups * self.topk_group
        if not (1 <= self.topk_group <= self.groups and 1 <= self.top_k <= kept):
            raise ValueError(
                f"topk: {self.top_k} experts are wanted from {self.topk_group} of {self.groups} groups of {num_experts} experts"
            )
        if correction_bias is not None:
            if correction_bias.shape != (num_experts,):
                raise ValueError(f"topk: correction_bias has shape {tuple(correction_bias.shape)}, not ({num_experts},)")
            if self.groups > 1 and num_experts == self.groups:
                raise ValueError("topk: a correction bias needs groups of at least two experts, and these have one")

    def complete(
        self, weights: torch.Tensor, ids: torch.Tensor, num_experts: int, num_token_non_padded: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights and ids of a token's experts, with the shared column behind them, and -1 for the ids of padding."""
        if self.shared_weight is not None:
            weights = functional.pad(weights, (0, 1), value=self.shared_weight)
            ids = functional.pad(ids, (0, 1), value=num_experts)
        if num_token_non_padded is not None:
            padding = torch.arange(len(ids), device=ids.device) >= num_token_non_padded
            ids = ids.masked_fill(padding.unsqueeze(-1), -1)
        return weights, ids


class Experts(NamedTuple):
    """What a layer's experts compute; see :meth:`sglang_fl.dispatch.ops.FLBackendBase.fused_moe`.

    Attributes:
        activation: silu, gelu, gelu_tanh or relu2.
        is_gated: whether w13 holds two matrices.
        weight_on_input: whether a token's weight multiplies what goes into the activation.
    """

    activation: str
    is_gated: bool
    weight_on_input: bool

    @classmethod
    def of(cls, config: Any) -> Experts:
        """Read off SGLang's MoeRunnerConfig."""
        return cls(config.activation, config.is_gated, config.apply_router_weight_on_input)

    def check(
        self,
        x: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        w13_bias: torch.Tensor | None,
    ) -> None:
        """Raises ValueError for an unknown activation, and for weights or routes whose shapes do not fit."""
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"fused_moe: the activation is one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        experts, rows, hidden = w13.shape
        if self.is_gated and rows % 2:
            raise ValueError(f"fused_moe: gated experts have two matrices in w13_weight; it cannot have {rows} rows")
        size = rows // 2 if self.is_gated else rows
        if w2.shape != (experts, hidden, size):
            raise ValueError(f"fused_moe: w2_weight has shape {tuple(w2.shape)}, not {(experts, hidden, size)} as w13_weight says")
        if x.shape[-1] != hidden or x.dim() != 2:
            raise ValueError(f"fused_moe: hidden_states has shape {tuple(x.shape)}, not [num_tokens, {hidden}] as w13_weight says")
        if topk_ids.shape != topk_weights.shape or topk_ids.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"fused_moe: {x.shape[0]} tokens with topk_weights {tuple(topk_weights.shape)} and topk_ids {tuple(topk_ids.shape)}"
            )
        if self.weight_on_input and w13_bias is not None:
            raise ValueError("fused_moe: experts with a bias do not take their weight on the input")


def topk_by(route: Callable[[torch.Tensor, torch.Tensor | None, Routing, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """The operator ``topk`` by a function ``route(router_logits, correction_bias, routing, num_token_non_padded)``."""

    def topk(
        obj: Any,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        *,
        num_token_non_padded: torch.Tensor | None = None,
        expert_location_dispatch_info: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if expert_location_dispatch_info is not None:
            raise NotImplementedError("topk: replicated experts are not supported")
        config = obj.topk_config
        return route(router_logits, config.correction_bias, Routing.of(config), num_token_non_padded)

    return topk


def fused_moe_by(compute: Callable[..., torch.Tensor]) -> Any:
    """The operator ``fused_moe`` by a function ``compute(x, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, experts)``."""

    def fused_moe(obj: Any, layer: Any, dispatch_output: Any) -> torch.Tensor:
        routed = dispatch_output.topk_output
        return compute(
            dispatch_output.hidden_states,
            layer.w13_weight,
            layer.w2_weight,
            routed.topk_weights,
            routed.topk_ids,
            getattr(layer, "w13_weight_bias", None),
            getattr(layer, "w2_weight_bias", None),
            Experts.of(layer.moe_runner_config),
        )

    return fused_moe
