# SPDX-License-Identifier: Apache-2.0
from operator import attrgetter
from typing import Any

import torch

from .base import TRIAL_TOKENS, Forward, ModelContext, Routes, check_result, scratch
from .layer import Layer, LayerBridge
from .moe import server_arguments, server_reason, sglang_topk

_UNKNOWN_EXPERTS, _UNKNOWN_SIZE = 64, 128
#: What selects and weighs experts in SGLang's TopKConfig, but for groups and a correction bias.
_routing = attrgetter(
    *("top_k", "scoring_func", "renormalize", "num_shared_topk_slots", "routed_scaling_factor"),
    *("apply_routed_scaling_factor_on_output", "fused_shared_experts_scaling_factor"),
)


class TopKBridge(LayerBridge):
    """SGLang's TopK: ``forward(hidden_states, router_logits, *, num_token_non_padded, …)``, a StandardTopKOutput."""

    op = "topk"

    def attribute_reason(self, layer: Layer) -> str | None:
        config = layer.topk_config
        if config.custom_routing_function is not None:
            return "custom routing function"
        if config.output_format is None or config.output_format.name != "STANDARD":
            return f"its runner needs the output format {getattr(config.output_format, 'name', None)}"
        if config.scoring_func not in ("softmax", "sigmoid"):
            return f"scoring_func={config.scoring_func}"
        if config.fused_gate_packed_ids:
            return "fused_gate_packed_ids=True"
        if config.runner_backend is not None and config.runner_backend.is_flashinfer_trtllm_routed():
            return "its runner takes raw logits"
        if layer.enable_waterfill or layer.waterfill_balancer is not None:
            return "waterfill balances its shared experts"
        return _biased(config) or _shared(config) or _recorded(layer) or server_reason()

    def trial_key(self, layer: Layer, context: ModelContext) -> tuple[Any, ...]:
        config = layer.topk_config
        bias = None if config.correction_bias is None else (config.correction_bias.dtype, config.correction_bias.shape)
        groups = config.use_grouped_topk and (config.num_expert_group, config.topk_group)
        return context.num_experts, groups, bias, *_routing(config)

    def trial(self, layer: Layer, context: ModelContext, fn: Forward) -> None:
        config = layer.topk_config
        bias = config.correction_bias
        experts = len(bias) if bias is not None else context.num_experts or _UNKNOWN_EXPERTS
        hidden_states = scratch(context, TRIAL_TOKENS, _UNKNOWN_SIZE)
        router_logits = scratch(context, TRIAL_TOKENS, experts)
        wanted = torch.empty(TRIAL_TOKENS, config.top_k, device=context.device)
        for num_tokens in (None, torch.ones(1, dtype=torch.int32, device=context.device)):
            result = fn(layer, hidden_states, router_logits.clone(), num_token_non_padded=num_tokens, expert_location_dispatch_info=None)
            if not isinstance(result, tuple) or len(result) < 2:
                raise TypeError(f"its result is {type(result).__name__}, not (topk_weights, topk_ids)")
            check_result("its topk_weights", result[0][:1], wanted[:1])
            check_result("its topk_ids", result[1], wanted.to(torch.int32))
            if result[0].shape != wanted.shape:
                raise ValueError(f"its topk_weights has shape {tuple(result[0].shape)}, not {tuple(wanted.shape)}")
            for name, x in zip(("topk_weights", "topk_ids"), result, strict=False):
                if not x.is_contiguous():
                    raise ValueError(f"its {name} is not contiguous, and SGLang's experts would read other numbers")
            _check_ids(result[1], experts + config.num_shared_topk_slots, padded=num_tokens is not None)

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own, contexts, divert, failed = routes
        sglang = sglang_topk()
        output, has_context, context = sglang.StandardTopKOutput, sglang.has_forward_context, sglang.get_forward_context
        # On NPUs SGLang's dispatchers want a valid expert for padded tokens too, of weight 0.
        keep_padded_ids = own.__name__ == "forward_npu"
        zero_padded = sglang._zero_topk_weights_padded_region

        def forward(
            self: Layer,
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            *,
            num_token_non_padded: torch.Tensor | None = None,
            expert_location_dispatch_info: Any = None,
            **more: Any,
        ) -> Any:
            if expert_location_dispatch_info is not None or (more and any(value is not None for value in more.values())):
                more["expert_location_dispatch_info"] = expert_location_dispatch_info
                return own(self, hidden_states, router_logits, num_token_non_padded=num_token_non_padded, **more)
            if contexts.active:
                return divert(self, hidden_states, router_logits, num_token_non_padded=num_token_non_padded)
            if dtypes is not None and router_logits.dtype not in dtypes:
                return own(self, hidden_states, router_logits, num_token_non_padded=num_token_non_padded)
            if num_token_non_padded is None and has_context():
                bound = context().moe_num_token_non_padded
                if bound is not None:
                    num_token_non_padded = bound()
            asked = None if keep_padded_ids else num_token_non_padded
            try:
                found = fn(self, hidden_states, router_logits, num_token_non_padded=asked)
            except Exception as error:
                args = (hidden_states, router_logits)
                found = failed(self, error, (self, *args), args, num_token_non_padded=asked)
            if keep_padded_ids:
                zero_padded(found[0], num_token_non_padded)
            return output(found[0], found[1], router_logits)

        return forward


def _biased(config: Any) -> str | None:
    bias = config.correction_bias
    if bias is None:
        return None
    if bias.dim() != 1:
        return "its correction bias differs by token"
    if config.scoring_func == "softmax" and not config.use_grouped_topk:
        return "SGLang's own forwards disagree on a correction bias of softmax scores"
    return None


def _shared(config: Any) -> str | None:
    slots = config.num_shared_topk_slots
    if not slots:
        return None
    from sglang.srt.layers.moe.utils import has_per_rank_fused_shared_slots

    if slots > 1:
        return f"it appends {slots} shared experts"
    if has_per_rank_fused_shared_slots(slots):
        return "each rank has its own shared expert"
    if not config.use_grouped_topk and config.scoring_func == "softmax":
        return "SGLang appends no shared expert to ungrouped softmax routing"
    if config.correction_bias is None and not config.routed_scaling_factor:
        return "its shared expert has no weight of its own without a routed_scaling_factor"
    return None


def _recorded(layer: Layer) -> str | None:
    """What else SGLang's forward does with the ids of its choice, if this server asks for it."""
    if sglang_topk().routing_simulation_enabled():
        return "SGLang simulates its routing"
    execution = server_arguments()
    if execution is None:
        return None
    if execution.moe.ep_dispatch_algorithm is not None and not layer.is_draft:
        return f"--ep-dispatch-algorithm {execution.moe.ep_dispatch_algorithm} replicates experts"
    if execution.moe.expert_distribution_recorder_mode is not None:
        return "--expert-distribution-recorder-mode records its choices"
    if execution.features.enable_return_routed_experts and layer.topk_config.allow_routed_experts_capture:
        return "--enable-return-routed-experts records its choices"
    return None


def _check_ids(ids: torch.Tensor, experts: int, *, padded: bool) -> None:
    rows = ids.tolist()
    if padded and set(rows.pop()) != {-1}:
        raise ValueError("its topk_ids of a padded token are not -1")
    for row in rows:
        if len(set(row)) != len(row) or not all(0 <= expert < experts for expert in row):
            raise ValueError(f"its topk_ids {row} are not {len(row)} of {experts} experts")
