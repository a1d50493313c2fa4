# SPDX-License-Identifier: Apache-2.0
import importlib
import logging
from functools import lru_cache
from typing import Any

import torch

from ...moe import RENORMALIZE_EPSILON, Experts, Routing, fused_moe_by, topk_by
from ..library import load

load()
topk_softmax = importlib.import_module("flag_gems.fused.topk_softmax").topk_softmax
grouped_topk = importlib.import_module("flag_gems.fused.grouped_topk").grouped_topk
#: ``flag_gems.fused.fused_moe`` may be the module or a function of its name, by the release.
_experts: Any = importlib.import_module("flag_gems.fused.fused_moe")
fused_experts_impl = _experts.fused_experts_impl

#: What one program of topk_softmax looks at; it takes further experts for absent.
_MOST_EXPERTS = 1024
#: It looks at no fewer.
_LEAST_PLACES = 32
#: Both kernels' limit.
_MOST_CHOSEN = 32
#: grouped_topk's limit.
_MOST_GROUPS = 32
#: A batch with fewer routes than a quarter of the experts is not sorted: the kernel goes through the routes as they are.
_SPARSE = 4


class _Once(logging.Filter):
    """FlagGems says at every call, as a warning, that it was not tuned for these experts."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in self._seen or self._seen.add(message))  # type: ignore[func-returns-value]


_experts.logger.addFilter(_Once())


def route(
    router_logits: torch.Tensor, correction_bias: torch.Tensor | None, routing: Routing, num_token_non_padded: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlagGems has a softmax over all experts, and DeepSeek-V3's groups of biased scores, of which one may be all experts."""
    num_experts = router_logits.shape[1]
    routing.check(num_experts, correction_bias)
    if routing.top_k > _MOST_CHOSEN:
        raise NotImplementedError(f"topk: FlagGems chooses up to {_MOST_CHOSEN} experts, not {routing.top_k}")
    way = _softmax if routing.scoring == "softmax" else _sigmoid
    weights, ids = way(router_logits, correction_bias, routing)
    # Where logits are nan, the kernels may choose any place that they look at. Those of the softmax are a power of two.
    if num_experts < _LEAST_PLACES or num_experts.bit_count() > 1 or routing.scoring != "softmax":
        ids.clamp_(0, num_experts - 1)
    return routing.complete(weights, ids, num_experts, num_token_non_padded)


def _softmax(router_logits: torch.Tensor, correction_bias: torch.Tensor | None, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = router_logits.shape
    if correction_bias is not None or routing.groups > 1:
        raise NotImplementedError("topk: FlagGems has no softmax routing with a correction bias or in groups")
    if num_experts > _MOST_EXPERTS:
        raise NotImplementedError(f"topk: FlagGems's softmax is over up to {_MOST_EXPERTS} experts, not {num_experts}")
    weights = router_logits.new_empty((num_tokens, routing.top_k), dtype=torch.float32)
    ids, source_rows = (torch.empty_like(weights, dtype=torch.int32) for _ in range(2))
    if num_tokens:
        topk_softmax(weights, ids, source_rows, router_logits.contiguous(), routing.renormalize)
    return weights if routing.scale == 1.0 else weights.mul_(routing.scale), ids


def _sigmoid(router_logits: torch.Tensor, correction_bias: torch.Tensor | None, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores are made here: FlagGems's own way to a sigmoid, by tanh, leaves nothing of small ones.

    Its kernel chooses 1, 2, 4, 8, … experts, the best first. Of more than are wanted the first ones are taken.
    """
    if correction_bias is None:
        raise NotImplementedError("topk: FlagGems has no sigmoid routing without a correction bias")
    if routing.groups > _MOST_GROUPS:
        raise NotImplementedError(f"topk: FlagGems's kernel has up to {_MOST_GROUPS} groups, not {routing.groups}")
    scores = router_logits.float().sigmoid()
    if not len(scores):
        empty = scores.new_empty((0, routing.top_k))
        return empty, empty.to(torch.int32)
    bias = correction_bias.float()
    chosen = 1 << (routing.top_k - 1).bit_length()
    renormalize, scale = routing.renormalize, routing.scale
    if chosen == routing.top_k:
        return grouped_topk(scores, routing.groups, routing.topk_group, chosen, renormalize, scale, bias)
    weights, ids = grouped_topk(scores, routing.groups, routing.topk_group, chosen, False, 1.0 if renormalize else scale, bias)
    weights, ids = weights[:, : routing.top_k].contiguous(), ids[:, : routing.top_k].contiguous()
    return weights.mul_(scale / (weights.sum(-1, keepdim=True) + RENORMALIZE_EPSILON)) if renormalize else weights, ids


def compute(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    experts: Experts,
) -> torch.Tensor:
    """Tokens are sorted by experts that the kernel counts from 0 to a power of two; the last ones stand for "not here".

    FlagGems would take a negative id for a place in memory before its counters, so that it gets none where it sorts.
    """
    experts.check(x, w13, w2, topk_weights, topk_ids, w13_bias)
    if (experts.activation, experts.is_gated) != ("silu", True):
        gated = "gated" if experts.is_gated else "not gated"
        raise NotImplementedError(f"fused_moe: FlagGems supports only experts gated by silu; these are {experts.activation}, {gated}")
    if x.dtype == torch.float32:
        raise TypeError("fused_moe: FlagGems multiplies fp32 in TF32, which rounds as bf16 does")
    if w13.stride(-1) != 1 or w2.stride(-1) != 1:
        raise ValueError("fused_moe: FlagGems needs the last dimension of the experts' weights contiguous")
    if not topk_ids.numel():
        return torch.zeros_like(x)
    count = w13.shape[0]
    # Made at the first call, the trial: what is made while a graph is captured lives in the graph alone.
    expert_map = _expert_map(count, x.device)
    named: dict[str, Any] = {}
    if topk_ids.numel() * _SPARSE > count:
        named = {"global_num_experts": _places(count), "expert_map": expert_map}
        topk_ids = topk_ids & _places(count) - 1  # of -1 the last place
    return fused_experts_impl(
        x.contiguous(),
        w13,
        w2,
        topk_weights.contiguous(),
        topk_ids.to(torch.int32).contiguous(),
        activation=experts.activation,
        apply_router_weight_on_input=experts.weight_on_input,
        w1_bias=w13_bias,
        w2_bias=w2_bias,
        **named,
    )


def _places(count: int) -> int:
    """The least power of two above ``count``: FlagGems counts routes faster for such a number of experts."""
    return 1 << count.bit_length()


@lru_cache(maxsize=64)
def _expert_map(count: int, device: torch.device) -> torch.Tensor:
    """``[places]``, int32: each expert's number, and -1 behind them."""
    places = torch.arange(_places(count), dtype=torch.int32)
    return places.masked_fill(places >= count, -1).to(device)


topk = topk_by(route)
fused_moe = fused_moe_by(compute)
