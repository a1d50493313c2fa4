# SPDX-License-Identifier: Apache-2.0
import torch
from sglang.kernels.ops.moe.moe_fused_gate import moe_fused_gate

from ....checks import check_offsets
from ....moe import Routing, topk_by


def route(
    router_logits: torch.Tensor, correction_bias: torch.Tensor | None, routing: Routing, num_token_non_padded: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel for all of it: scores, groups, choice, weights, the shared column and the padding."""
    routing.check(router_logits.shape[1], correction_bias)
    if routing.scoring == "softmax" and (correction_bias is not None or routing.groups > 1):
        raise NotImplementedError("topk: the kernel has no softmax routing with a correction bias or in groups")
    if routing.scoring == "sigmoid" and correction_bias is None:
        raise NotImplementedError("topk: the kernel has no sigmoid routing without a correction bias")
    columns = routing.top_k + (routing.shared_weight is not None)
    if not router_logits.shape[0]:
        empty = router_logits.new_empty((0, columns), dtype=torch.float32)
        return empty, empty.to(torch.int32)
    check_offsets("topk", router_logits.shape[0], router_logits.stride(0))
    shared, factor, scaled = routing.shared_weight, routing.scale, routing.scale != 1.0
    if shared is not None and not scaled:
        # The kernel gives the shared column the reciprocal of a factor that it does not apply.
        factor = 1.0 / shared
    weights, ids = moe_fused_gate(
        router_logits,
        correction_bias,
        columns,
        scoring_func=routing.scoring,
        num_fused_shared_experts=int(shared is not None),
        renormalize=routing.renormalize,
        routed_scaling_factor=factor,
        apply_routed_scaling_factor_on_output=scaled,
        num_expert_group=routing.groups,
        topk_group=routing.topk_group,
        num_token_non_padded=num_token_non_padded,
    )
    if shared is not None and scaled and shared != 1.0:
        weights[:, -1] = shared
    return weights, ids


topk = topk_by(route)
