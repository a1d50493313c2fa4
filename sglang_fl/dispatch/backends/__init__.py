# SPDX-License-Identifier: Apache-2.0
"""Sources of kernels. A backend knows its kernels and ``dispatch.types``, never SGLang, never another."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..ops import FLBackendBase as Backend
from .moe import Experts, Routing

if TYPE_CHECKING:
    import torch

__all__ = ["Backend", "KernelBackend"]


class KernelBackend(Backend):
    """A backend whose operators are functions of the package ``impl`` beside it, which take tensors instead of layers.

    What has one row of positions is a plain rotary embedding: ``mrotary_embedding`` needs ``rotary_embedding``, too. ``impl``
    is imported at the first call: tools list the backends without paying for PyTorch or a kernel library. It
    has those of these that the backend registers::

        gelu_and_mul(x, approximate)
        new_gelu(x)
        quick_gelu(x)
        relu2(x)
        silu_and_mul(x)
        gemma_rms_norm(x, residual, weight, eps)
        layer_norm(x, weight, bias, eps)
        rms_norm(x, residual, weight, eps)
        rotary_embedding(query, key, cos, sin, position_ids, interleaved, inplace)
        mrotary_embedding(query, key, cos, sin, positions, interleaved, axis_map, mrope_section, mrope_interleaved)
        topk(router_logits, correction_bias, routing, num_token_non_padded)
        fused_moe(x, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, experts)
        chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, fused_recurrent_gated_delta_rule_packed_decode:
            as the operators, all arguments by position
    """

    def is_available(self) -> bool:
        return self.why_unavailable() is None

    def why_unavailable(self) -> str | None:
        return None

    @cached_property
    def _impl(self) -> Any:
        return import_module(f"{type(self).__module__.rpartition('.')[0]}.impl")

    def gelu_and_mul(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        return self._impl.gelu_and_mul(x, obj.approximate)

    def new_gelu(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        return self._impl.new_gelu(x)

    def quick_gelu(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        return self._impl.quick_gelu(x)

    def relu2(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        return self._impl.relu2(x)

    def silu_and_mul(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        return self._impl.silu_and_mul(x)

    def gemma_rms_norm(
        self, obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self._impl.gemma_rms_norm(x, residual, obj.weight, obj.variance_epsilon)

    def layer_norm(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        return self._impl.layer_norm(x, obj.weight, obj.bias, obj.variance_epsilon)

    def rms_norm(self, obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self._impl.rms_norm(x, residual, obj.weight, obj.variance_epsilon)

    def rotary_embedding(
        self,
        obj: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor,
        rotary_interleaved: bool = False,
        inplace: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._impl.rotary_embedding(query, key, cos, sin, position_ids, rotary_interleaved, inplace)

    def mrotary_embedding(
        self, obj: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = obj.cos_sin_cache.chunk(2, -1)
        by_head = tuple(x.reshape(x.shape[0], x.shape[1:].numel() // obj.head_size, obj.head_size) for x in (query, key))
        interleaved = not obj.is_neox_style
        if positions.dim() == 1:
            rotated = self._impl.rotary_embedding(*by_head, cos, sin, positions, interleaved, True)
        else:
            rotated = self._impl.mrotary_embedding(
                *by_head, cos, sin, positions, interleaved, obj.axis_map, obj.mrope_section, obj.mrope_interleaved
            )
        return rotated[0].reshape(query.shape), rotated[1].reshape(key.shape)

    def topk(
        self,
        obj: Any,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        *,
        num_token_non_padded: torch.Tensor | None = None,
        expert_location_dispatch_info: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if expert_location_dispatch_info is not None:
            raise NotImplementedError("topk: experts that have several places are SGLang's to choose from")
        config = obj.topk_config
        return self._impl.topk(router_logits, config.correction_bias, Routing.of(config), num_token_non_padded)

    def fused_moe(self, obj: Any, layer: Any, dispatch_output: Any) -> torch.Tensor:
        routed = dispatch_output.topk_output
        return self._impl.fused_moe(
            dispatch_output.hidden_states,
            layer.w13_weight,
            layer.w2_weight,
            routed.topk_weights,
            routed.topk_ids,
            getattr(layer, "w13_weight_bias", None),
            getattr(layer, "w2_weight_bias", None),
            Experts.of(layer.moe_runner_config),
        )

    def chunk_gated_delta_rule(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        initial_state_indices: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        inplace_update: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._impl.chunk_gated_delta_rule(
            q, k, v, g, beta, scale, initial_state, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel, inplace_update
        )

    def fused_recurrent_gated_delta_rule(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor | None = None,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._impl.fused_recurrent_gated_delta_rule(
            q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel
        )

    def fused_recurrent_gated_delta_rule_packed_decode(
        self,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        A_log: torch.Tensor,
        dt_bias: torch.Tensor,
        scale: float,
        initial_state: torch.Tensor,
        out: torch.Tensor,
        ssm_state_indices: torch.Tensor,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._impl.fused_recurrent_gated_delta_rule_packed_decode(
            mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel
        )
