# SPDX-License-Identifier: Apache-2.0
"""Sources of kernels. A backend knows its kernels and ``dispatch.types``, never SGLang, never another."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..ops import FLBackendBase as Backend

if TYPE_CHECKING:
    import torch

__all__ = ["Backend", "KernelBackend"]


class KernelBackend(Backend):
    """A backend whose operators are functions of the package ``impl`` beside it, which take tensors instead of layers.

    ``impl`` is imported at the first call: tools list the backends without paying for PyTorch or a kernel library. It
    has those of these that the backend registers::

        silu_and_mul(x)
        rms_norm(x, residual, weight, eps)
        rotary_embedding(query, key, cos, sin, position_ids, interleaved, inplace)
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

    def silu_and_mul(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        return self._impl.silu_and_mul(x)

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
