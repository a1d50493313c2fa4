# SPDX-License-Identifier: Apache-2.0
import torch
import torch_npu

from ....moe import RENORMALIZE_EPSILON, Routing, topk_by

#: npu_moe_gating_top_k's limits: experts in all, and a group's least number of them.
_MOST_EXPERTS, _LEAST_IN_A_GROUP = 2048, 3
#: It lays each group out in steps of so many experts.
_STEP = 32
_SOFTMAX, _SIGMOID = 0, 1
_BY_BEST, _BY_TWO_BEST = 0, 1


def route(
    router_logits: torch.Tensor, correction_bias: torch.Tensor | None, routing: Routing, num_token_non_padded: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch_npu's operators choose; what becomes of the weights is computed here, for they do not say it of all cases."""
    num_experts = router_logits.shape[1]
    routing.check(num_experts, correction_bias)
    weights, ids = _chosen(router_logits.float(), correction_bias, routing)
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + RENORMALIZE_EPSILON)
    if routing.scale != 1.0:
        weights = weights * routing.scale
    return routing.complete(weights, ids, num_experts, num_token_non_padded)


def _chosen(logits: torch.Tensor, correction_bias: torch.Tensor | None, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """``[num_tokens, top_k]``: the scores and numbers of the experts chosen."""
    num_tokens, num_experts = logits.shape
    if not num_tokens:
        empty = logits.new_empty((0, routing.top_k))
        return empty, empty.to(torch.int32)
    if routing.scoring == "softmax" and correction_bias is None and routing.groups == 1:
        scores, ids, _ = torch_npu.npu_moe_gating_top_k_softmax(logits.contiguous(), None, routing.top_k)
        return scores, ids
    size = num_experts // routing.groups
    if size < _LEAST_IN_A_GROUP or -(-size // _STEP) * _STEP * routing.groups > _MOST_EXPERTS:
        raise ValueError(f"topk: npu_moe_gating_top_k takes no {routing.groups} groups of {size} experts")
    _, ids, scores = torch_npu.npu_moe_gating_top_k(
        logits,
        routing.top_k,
        bias=None if correction_bias is None else correction_bias.float(),
        k_group=routing.topk_group,
        group_count=routing.groups,
        group_select_mode=_BY_BEST if correction_bias is None else _BY_TWO_BEST,
        norm_type=_SOFTMAX if routing.scoring == "softmax" else _SIGMOID,
        out_flag=True,
    )
    return scores.gather(1, ids.long()), ids


topk = topk_by(route)
