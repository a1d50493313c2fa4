# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import torch
from torch.nn import functional

from ...moe import RENORMALIZE_EPSILON, Experts, Routing, fused_moe_by, topk_by

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
}


def route(
    router_logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    routing: Routing,
    num_token_non_padded: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, choices and weights in fp32."""
    num_experts = router_logits.shape[1]
    routing.check(num_experts, correction_bias)
    logits = router_logits.float()
    scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias.float()
    if routing.groups > 1:
        by_group = choice.unflatten(-1, (routing.groups, -1))
        best = by_group.amax(-1) if correction_bias is None else by_group.topk(2, dim=-1).values.sum(-1)
        dropped = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(routing.topk_group, dim=-1).indices, False)
        choice = by_group.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1)
    ids = choice.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + RENORMALIZE_EPSILON)
    weights = weights * routing.scale
    return routing.complete(weights, ids.to(torch.int32), num_experts, num_token_non_padded)


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
    """One expert after the other, in fp32; the sum is rounded once.

    On a CPU an expert computes the tokens that go to it. Elsewhere it computes all of them: which tokens those are
    would have to be asked from the device, which cannot be done while a graph is captured.
    """
    experts.check(x, w13, w2, topk_weights, topk_ids, w13_bias)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    activation = _ACTIVATIONS[experts.activation]
    ask = can_be_asked(x.device)
    for expert in topk_ids[topk_ids >= 0].unique().tolist() if ask else range(w13.shape[0]):
        chosen = topk_ids == expert
        is_routed = chosen.any(-1)
        rows = is_routed.nonzero().squeeze(-1) if ask else slice(None)
        # A token has an expert once.
        weight = torch.where(chosen, topk_weights, 0.0).sum(-1, keepdim=True)[rows]
        hidden = functional.linear(x[rows].float(), w13[expert].float(), None if w13_bias is None else w13_bias[expert].float())
        if experts.weight_on_input:
            hidden = hidden * weight
        if experts.is_gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = activation(gate) * up
        else:
            hidden = activation(hidden)
        computed = functional.linear(hidden, w2[expert].float(), None if w2_bias is None else w2_bias[expert].float())
        if not experts.weight_on_input:
            computed = computed * weight
        out[rows] += computed if ask else torch.where(is_routed.unsqueeze(-1), computed, 0.0)
    return out.to(x.dtype)


def can_be_asked(device: torch.device) -> bool:
    """Whether the host may wait for a number from the device."""
    return device.type == "cpu"


topk = topk_by(route)
fused_moe = fused_moe_by(compute)
