# SPDX-License-Identifier: Apache-2.0
import sys
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .base import TRIAL_TOKENS, Forward, ModelContext, Routes, check_result, first_difference, scratch
from .layer import Layer, LayerBridge
from .moe import server_reason, sglang_topk

#: (activation, is_gated) that the operator's text knows.
_ACTIVATIONS = frozenset((name, gated) for name in ("silu", "gelu", "gelu_tanh", "relu2") for gated in (True, False))
#: Options of SGLang's MoeRunnerConfig that change the result, and the value that does not.
_STANDARD = {"gemm1_alpha": None, "gemm1_clamp_limit": None, "swiglu_limit": None, "no_combine": False, "silu_mul_keep_fp32": False}
#: What the experts compute, of the same.
_computation = attrgetter("num_experts", "top_k", "activation", "is_gated", "apply_router_weight_on_input")
#: SGLang's forwards by whether they multiply with routed_scaling_factor; after the others the model does.
_SCALES = {"forward_cuda": True, "forward_musa": True, "forward_cpu": False, "forward_native": False}


class FusedMoEBridge(LayerBridge):
    """SGLang's UnquantizedFusedMoEMethod, a module below each FusedMoE layer: ``forward(layer, dispatch_output)``."""

    op = "fused_moe"

    def parameters(self, layer: Layer) -> Iterator[nn.Parameter]:
        owner = getattr(getattr(layer, "moe_runner_config", None), "layer", None)
        return iter(()) if owner is None else owner.parameters()

    def attribute_reason(self, layer: Layer) -> str | None:
        if type(layer).apply is not self.layer_class.apply:  # type: ignore[union-attr]
            return f"{type(layer).__name__} overrides apply"
        config = getattr(layer, "moe_runner_config", None)
        if config is None or layer.runner is None:
            return "it has no runner"
        owner = config.layer
        if owner is None or owner.quant_method is not layer:
            return "its layer uses another quant_method"
        return self._reason_in_runner(layer, owner) or self._reason_in_config(layer, config, owner) or server_reason()

    def _reason_in_runner(self, layer: Layer, owner: Any) -> str | None:
        runner = layer.runner
        if not runner.runner_backend.is_triton():
            return f"its runner is {runner.runner_backend.value}"
        if layer._aiter_runner is not None:
            return "its runner is aiter"
        if runner.lora_enabled:
            return "its runner serves LoRA"
        if type(owner.dispatcher).__name__ != "StandardDispatcher":
            return f"its tokens are dispatched by {type(owner.dispatcher).__name__}"
        return None

    def _reason_in_config(self, layer: Layer, config: Any, owner: Any) -> str | None:
        if (config.activation, config.is_gated) not in _ACTIVATIONS:
            return f"activation={config.activation}, is_gated={config.is_gated}"
        if difference := first_difference(config, _STANDARD):
            return difference
        if layer.w13_swiglu_interleaved or layer.load_up_proj_weight_first or layer.use_triton_kernels:
            return "its weights have another layout"
        if getattr(owner, "use_intel_amx_backend", False):
            return "its weights are packed for AMX"
        own = layer._resolve_forward_method().__name__
        if own not in _SCALES:
            return f"SGLang runs it as {own}"
        if config.activation == "gelu" and not _SCALES[own]:
            return f"SGLang's {own} approximates gelu with tanh"
        if config.apply_router_weight_on_input and config.routed_scaling_factor not in (None, 1.0) and _SCALES[own]:
            return "router weights are applied to the input, and routed_scaling_factor to the output"
        if config.apply_router_weight_on_input and layer.with_bias:
            return "router weights are applied to the input of experts with a bias"
        return _reason_in_weights(config, owner)

    def trial_key(self, layer: Layer, context: ModelContext) -> tuple[Any, ...]:
        config, owner = layer.moe_runner_config, layer.moe_runner_config.layer
        return owner.w13_weight.dtype, owner.w13_weight.shape, layer.with_bias, *_computation(config)

    def trial(self, layer: Layer, context: ModelContext, fn: Forward) -> None:
        config, owner = layer.moe_runner_config, layer.moe_runner_config.layer
        experts, _, hidden_size = owner.w13_weight.shape
        top_k = min(config.top_k or 1, experts)
        x = scratch(context, TRIAL_TOKENS, hidden_size)
        ids = torch.arange(top_k, dtype=torch.int32, device=context.device).repeat(TRIAL_TOKENS, 1)
        ids[-1, -1] = -1
        weights = torch.full(ids.shape, 1 / top_k, device=context.device)
        logits = x.new_zeros(TRIAL_TOKENS, experts)
        given = _dispatch_output()(x.clone(), None, sglang_topk().StandardTopKOutput(weights, ids, logits))
        result = fn(layer, owner, given)
        check_result("its result", result.hidden_states if isinstance(result, _combine_input()) else result, x)

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own, contexts, divert, failed = routes
        dispatched, combined = _dispatch_output(), _combine_input()
        sglang = sglang_topk()
        routed, packed = sglang.StandardTopKOutput, sglang.StandardTopKOutputPacked
        scales = _SCALES[own.__name__]

        def forward(self: Layer, layer: Layer, dispatch_output: Any) -> Any:
            x, topk_output = dispatch_output.hidden_states, dispatch_output.topk_output
            if (
                type(dispatch_output) is not dispatched
                or dispatch_output.hidden_states_scale is not None
                or dispatch_output.hidden_states_pre_quant is not None
                or (type(topk_output) is not routed and type(topk_output) is not packed)
            ):
                return own(self, layer, dispatch_output)
            if contexts.active:
                return divert(self, layer, dispatch_output)
            if dtypes is not None and x.dtype not in dtypes:
                return own(self, layer, dispatch_output)
            given = dispatch_output
            factor = self.moe_runner_config.routed_scaling_factor if scales else None
            if factor is not None and factor != 1.0:
                scaled = routed(topk_output.topk_weights * factor, topk_output.topk_ids, topk_output.router_logits)
                given = dispatched(x, None, scaled)
            try:
                found = fn(self, layer, given)
            except Exception as error:
                found = failed(self, error, (self, layer, given), (layer, dispatch_output))
            return found if type(found) is combined else combined(found)

        return forward


def _dispatch_output() -> Any:
    return sys.modules["sglang.srt.layers.moe.token_dispatcher.standard"].StandardDispatchOutput


def _combine_input() -> Any:
    return sys.modules[_dispatch_output().__module__].StandardCombineInput


def _reason_in_weights(config: Any, owner: Any) -> str | None:
    w13, w2 = owner.w13_weight, owner.w2_weight
    if w13.dim() != 3 or w2.dim() != 3 or w13.dtype != w2.dtype:
        return "its weights are not [experts, rows, columns] of one dtype"
    if w2.shape != (w13.shape[0], w13.shape[2], w13.shape[1] // 2 if config.is_gated else w13.shape[1]):
        return f"its weights have shapes {tuple(w13.shape)} and {tuple(w2.shape)}"
    return None
