# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .judge import TINY, U32, Exact, Verdict, exactly, misfit, smallest, summation, u

#: An implementation may add this epsilon to the sum of a softmax's weights. For smaller sums the quotient is not judged.
_SOFTMAX_EPSILON = 1e-8


class Routing(NamedTuple):
    """How experts are selected and weighted; see :meth:`sglang_fl.dispatch.ops.FLBackendBase.topk`.

    Attributes:
        top_k: the experts of a token, without the shared one.
        scoring: softmax or sigmoid.
        groups, topk_group: the number of groups of experts, and how many are kept. 1 and 1 without groups.
        scale: the final factor of the weights.
        shared_weight: the weight of the shared expert, the last column. None: there is none.
    """

    top_k: int
    scoring: str
    renormalize: bool
    groups: int
    topk_group: int
    scale: float
    shared_weight: float | None


class Experts(NamedTuple):
    """The computation of a layer's experts; see :meth:`sglang_fl.dispatch.ops.FLBackendBase.fused_moe`.

    Attributes:
        activation: silu, gelu, gelu_tanh or relu2.
        is_gated: whether w13 holds two matrices.
        weight_on_input: whether a token's weight multiplies the input of the activation.
    """

    activation: str
    is_gated: bool
    weight_on_input: bool


@dataclass(frozen=True)
class Routed:
    """A routing in float64. An implementation's is right if it chose experts that are as good as the best ones, up to
    what rounding may change, and weighted those that it chose as :class:`Exact` says.

    Attributes:
        scores: ``[num_tokens, num_experts]``.
        choice: the score for choosing. -inf for experts of groups that are not chosen.
        sharpness: ``[num_tokens, 1]``, the effect of one rounding of an exponential's argument.
        gap: ``[num_tokens]``, the distance between the last chosen and the first unchosen expert or group.
        routing: how many experts, and how they are weighted.
        real: the tokens before the padding.
    """

    scores: torch.Tensor
    choice: torch.Tensor
    sharpness: torch.Tensor
    gap: torch.Tensor
    routing: Routing
    real: int

    def judge(self, got: Any, dtype: torch.dtype, device: torch.device | None = None) -> Verdict:
        """Compare ``(topk_weights, topk_ids)`` with this routing. ``dtype`` of the logits does not matter."""
        if len(got) != 2:
            return Verdict(problem=f"returned {len(got)} results, expected topk_weights and topk_ids")
        weights, ids = got
        tokens, experts = self.scores.shape
        shape = tokens, self.routing.top_k + (self.routing.shared_weight is not None)
        for name, x, wanted in (("topk_weights", weights, torch.float32), ("topk_ids", ids, torch.int32)):
            problem = misfit(name, x, shape, wanted, device)
            if problem is None and not x.is_contiguous():
                problem = f"{name} is not contiguous: SGLang's experts would read other numbers"
            if problem:
                return Verdict(problem=problem)
        rows = ids.cpu().long()
        if bool((rows[self.real :] != -1).any()):
            return Verdict(problem="topk_ids of padding are not all -1")
        rows, weights = rows[: self.real], weights.cpu()[: self.real]
        if self.routing.shared_weight is not None:
            if bool((rows[:, -1] != experts).any()):
                return Verdict(problem=f"the last of topk_ids is not the shared expert, {experts}")
            rows = rows[:, :-1]
        if bool(((rows < 0) | (rows >= experts)).any()):
            return Verdict(problem=f"topk_ids are not within the {experts} experts")
        numbers = ~self.scores[: self.real].isnan().any(-1)
        return self._judge_numbers(rows[numbers], weights[numbers], numbers)

    def _judge_numbers(self, ids: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor) -> Verdict:
        """Judge rows without nan. In rows with nan only the range of the ids is checked."""
        if not ids.numel():
            return Verdict()
        ordered = ids.sort(dim=-1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            return Verdict(problem="a token has an expert twice")
        scores, choice, sharp = (x[: self.real][numbers] for x in (self.scores, self.choice, self.sharpness))
        least = choice.topk(self.routing.top_k, dim=-1).values[:, -1:]
        bias = torch.where(choice.isinf(), 0.0, choice - scores).abs().amax(-1, keepdim=True)
        added = torch.where(bias > 0, bias + scores.amax(-1, keepdim=True), 0.0)
        allowed = U32 * (32 + 4 * sharp) * (least.abs() + added) + TINY
        worse = least - choice.gather(1, ids) > allowed
        if bool(worse.any()):
            token, column = (int(i[0]) for i in worse.nonzero(as_tuple=True))
            return Verdict(problem=f"token {token} got expert {int(ids[token, column])}, but others score higher")
        return self._weights(scores.gather(1, ids), sharp).judge(weights, torch.float32)

    def _weights(self, scores: torch.Tensor, sharp: torch.Tensor) -> Exact:
        routing, experts = self.routing, self.scores.shape[1]
        value, lost = scores, torch.full_like(scores, 2.0**-126)
        if routing.renormalize:
            total = scores.sum(-1, keepdim=True) + 1e-20
            # A score that underflows is also missing from the sum.
            value, lost = scores / total, lost * (routing.top_k + 1) / total
            epsilon = _SOFTMAX_EPSILON / total
        else:
            epsilon = torch.full_like(scores[:, :1], _SOFTMAX_EPSILON)
        if routing.scoring == "softmax":
            lost = lost + value * epsilon
        value, lost = value * routing.scale, lost * abs(routing.scale)
        if routing.shared_weight is not None:
            last = torch.full_like(value[:, :1], routing.shared_weight)
            value, lost = torch.cat((value, last), -1), torch.cat((lost, torch.zeros_like(last)), -1)
        return Exact("topk_weights", value, value.abs() * (1 + sharp / 4), 16 + 2 * math.log2(experts), lost)


def topk(
    router_logits: torch.Tensor,
    e_score_correction_bias: torch.Tensor | None,
    routing: Routing,
    num_token_non_padded: torch.Tensor | None = None,
) -> tuple[Routed, ...]:
    """``routing`` is not derived from the layer's configuration, which the implementation has to interpret."""
    logits = exactly(router_logits)
    if routing.scoring == "softmax":
        scores, sharp = logits.softmax(-1), logits.amax(-1, keepdim=True) - logits.amin(-1, keepdim=True)
    else:
        scores, sharp = logits.sigmoid(), logits.abs().amax(-1, keepdim=True)
    bias = e_score_correction_bias
    choice = scores if bias is None else scores + exactly(bias)
    gap = torch.full(choice.shape[:1], math.inf, dtype=torch.float64)
    if routing.groups > 1:
        groups = choice.unflatten(-1, (routing.groups, -1))
        best = groups.amax(-1) if bias is None else groups.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(routing.topk_group, dim=-1).indices, True)
        choice = groups.masked_fill(~kept.unsqueeze(-1), -math.inf).flatten(1)
        gap = _lead(best, routing.topk_group)
    gap = torch.minimum(gap, _lead(choice, routing.top_k))
    real = len(logits) if num_token_non_padded is None else min(len(logits), int(num_token_non_padded))
    return (Routed(scores, choice, sharp.nan_to_num(0, 0, 0), gap, routing, real),)


def _lead(choice: torch.Tensor, k: int) -> torch.Tensor:
    """``[num_tokens]``: the distance between the k-th best and the next."""
    best = choice.sort(dim=-1, descending=True).values
    return best[:, k - 1] - best[:, k] if k < best.shape[1] else torch.full(best.shape[:1], math.inf, dtype=torch.float64)


#: activation -> (the function, its largest amplification of an error of its argument, except for relu2).
_ACTIVATIONS = {
    "silu": (lambda x: x * torch.sigmoid(x), 1.1),
    "gelu": (lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2, 1.13),
    "gelu_tanh": (lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2, 1.13),
    "relu2": (lambda x: x.clamp(min=0).square(), None),
}


def fused_moe(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_weight: torch.Tensor,
    w2_weight: torch.Tensor,
    experts: Experts,
    w13_weight_bias: torch.Tensor | None = None,
    w2_weight_bias: torch.Tensor | None = None,
) -> tuple[Exact, ...]:
    """First-order forward error analysis: each rounding error is propagated through the following steps."""
    tokens, ids, weights = exactly(hidden_states), topk_ids.cpu().long(), exactly(topk_weights)
    value, terms, lost = (torch.zeros_like(tokens) for _ in range(3))
    for expert in range(len(w13_weight)):
        rows, columns = (ids == expert).nonzero(as_tuple=True)
        if not len(rows):
            continue
        w13, w2 = (exactly(weight[expert]) for weight in (w13_weight, w2_weight))
        b13, b2 = (0.0 if bias is None else exactly(bias[expert]) for bias in (w13_weight_bias, w2_weight_bias))
        found = _expert(tokens[rows], weights[rows, columns].unsqueeze(-1), w13, w2, b13, b2, experts, hidden_states.dtype)
        for total, part in zip((value, terms, lost), found, strict=True):
            total.index_add_(0, rows, part)
    return (Exact("result", value, terms.nan_to_num(), 8 + ids.shape[1], lost.nan_to_num()),)


def _expert(
    x: torch.Tensor, weight: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, b13: Any, b2: Any, experts: Experts, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An expert's weighted output, the size of its terms, and its largest rounding error.

    The results of both matrix products and of the activation may each be rounded to ``dtype``.
    """
    rounding, least, size = u(dtype) + 4 * U32, smallest(dtype), torch.abs
    hidden = x @ w13.T + b13
    wrong = U32 * summation(x.shape[-1]) * (size(x) @ size(w13.T) + size(torch.as_tensor(b13)))
    if experts.weight_on_input:
        hidden, wrong = hidden * weight, wrong * size(weight)
    wrong = wrong + rounding * size(hidden) + least
    function, slope = _ACTIVATIONS[experts.activation]
    gate, gate_wrong = (x.chunk(2, -1)[0] if experts.is_gated else x for x in (hidden, wrong))
    moved = gate_wrong * (2 * (size(gate) + gate_wrong) if slope is None else slope)
    # exp in fp32 turns one rounding of its argument into |gate| roundings of its result.
    out = function(gate)
    moved = moved + U32 * (8 + size(gate)) * size(out) + 2.0**-126 * (1 + size(gate))
    if experts.is_gated:
        up, up_wrong = hidden.chunk(2, -1)[1], wrong.chunk(2, -1)[1]
        out, moved = out * up, moved * (size(up) + up_wrong) + size(out) * up_wrong
    moved = moved + rounding * size(out) + least
    result, terms = out @ w2.T + b2, size(out) @ size(w2.T) + size(torch.as_tensor(b2))
    wrong = moved @ size(w2.T) + U32 * summation(out.shape[-1]) * terms
    if not experts.weight_on_input:
        result, terms, wrong = result * weight, terms * size(weight), wrong * size(weight)
    return result, terms, wrong + rounding * size(result) + least
