# SPDX-License-Identifier: Apache-2.0
"""The operators: what every implementation is called with, and what it must give back.

Common to all of them:

- ``obj`` is the layer that is being computed; its weights and constants are read from it
  (``obj.weight``, ``obj.variance_epsilon``). An implementation never writes to it.
- Activations are fp32, bf16 or fp16. A result has the dtype and device of its input.
- Any input may have no tokens (a dimension of size 0), and may be not contiguous.
- Arithmetic inside is fp32 or better; only the result is rounded to the activation's dtype.
- Inputs are only read, except where an operator's text allows writing them. The caller uses what is
  returned and nothing else.
- An implementation works under graph capture where its device has graphs: no synchronisation with
  the host, no allocation outside the framework's allocator, no shape that depends on data.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class FLBackendBase(ABC):
    """A backend: the operators that one source of kernels implements.

    A backend overrides the operators it has, and registers an
    :class:`~sglang_fl.dispatch.types.OpImpl` for each of them.
    """

    @abstractmethod
    def is_available(self) -> bool:
        """Whether this backend can run on this machine. Called once, before anything else."""

    def why_unavailable(self) -> str | None:
        """None if this backend can run on this machine, else the reason in words."""
        return None if self.is_available() else f"{self.name} says that it cannot run on this machine"

    @property
    @abstractmethod
    def name(self) -> str:
        """The backend's name."""

    @property
    def vendor(self) -> str | None:
        """Whose chip the backend is for; None: any."""
        return None

    def silu_and_mul(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        """SiLU of the first half of the last dimension, times the second half.

        ``out[..., i] = silu(x[..., i]) * x[..., d + i]``, with ``silu(v) = v / (1 + exp(-v))``
        (Shazeer 2020, arXiv:2002.05202, SwiGLU).

        Args:
            obj: the layer; nothing of it is needed.
            x: ``[..., 2 * d]``.

        Returns:
            ``[..., d]``, a new tensor.
        """
        raise NotImplementedError(f"{self.name} has no silu_and_mul")

    def rms_norm(self, obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Root mean square normalisation over the last dimension, after adding the residual if there is one.

        ``y = h / sqrt(mean(h ** 2) + eps) * weight`` with ``h = x`` or ``h = x + residual``
        (Zhang and Sennrich 2019, arXiv:1910.07467). ``h`` is not rounded before it is normalised.

        Args:
            obj: the layer: ``obj.weight`` ``[hidden_size]``, possibly of another dtype than x, and
                ``obj.variance_epsilon``, a float.
            x: ``[..., hidden_size]``. Written only if there is a residual.
            residual: the shape and dtype of x, or None. May be written.

        Returns:
            Without residual ``y``, a new tensor; with it ``(y, h)``, both in x's dtype, in the
            storage of x and residual or in new tensors.
        """
        raise NotImplementedError(f"{self.name} has no rms_norm")

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
        """Rotary position embedding of query and key (Su et al. 2021, arXiv:2104.09864).

        The first ``rotary_dim`` numbers of each head are rotated in pairs ``(a, b)`` to
        ``(a * cos - b * sin, b * cos + a * sin)``; the rest of the head is passed on. Pair ``i`` is
        ``(i, i + rotary_dim / 2)``, or ``(2 * i, 2 * i + 1)`` if ``rotary_interleaved``.

        Args:
            obj: the layer; nothing of it is needed.
            query: ``[num_tokens, num_heads, head_dim]``, the last dimension contiguous.
            key: ``[num_tokens, num_kv_heads, head_dim]``, the last dimension contiguous.
            cos, sin: ``[max_position, rotary_dim / 2]``, possibly of another dtype than query and
                not contiguous; ``rotary_dim <= head_dim``.
            position_ids: ``[num_tokens]``, int32 or int64: the rows of cos and sin.
            rotary_interleaved: which numbers make a pair.
            inplace: True allows writing query and key; False forbids it.

        Returns:
            ``(query, key)`` rotated, in their shapes and dtypes.
        """
        raise NotImplementedError(f"{self.name} has no rotary_embedding")

    def topk(
        self,
        obj: Any,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        *,
        num_token_non_padded: torch.Tensor | None = None,
        expert_location_dispatch_info: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts that each token goes to, and their weights (Shazeer et al. 2017, arXiv:1701.06538).

        ``score = softmax(router_logits)`` or ``sigmoid(router_logits)`` by ``scoring_func``; an expert is chosen by
        ``choice = score + correction_bias`` and weighted by ``score`` alone (DeepSeek-AI 2024, arXiv:2412.19437).
        The ``top_k - num_shared_topk_slots`` experts with the largest choice are the token's. With
        ``use_grouped_topk`` they come from the ``topk_group`` best of ``num_expert_group`` equal groups of experts in
        a row; a group is as good as its largest choice or, with a correction bias, as the sum of its two largest.
        Which of equal choices wins is open. Then, in this order:

        - ``renormalize``: a token's weights are divided by their sum plus 1e-20 (or, with softmax, up to 1e-8);
        - ``apply_routed_scaling_factor_on_output``: they are multiplied by ``routed_scaling_factor`` (None: 1);
        - with a shared slot one column more, the last: expert ``num_experts``, of weight 1 if the scaling factor was
          applied, else ``1 / routed_scaling_factor`` (None or 0: 1), times ``fused_shared_experts_scaling_factor``
          (None: 1).

        Args:
            obj: the layer; ``obj.topk_config`` has what is named above: ``top_k``, ``scoring_func`` ("softmax" or
                "sigmoid"; with groups and a correction bias it is sigmoid, whatever stands there), ``renormalize``,
                ``correction_bias`` (``[num_experts]`` of any floating-point dtype, or None), ``use_grouped_topk``,
                ``num_expert_group``, ``topk_group``, ``num_shared_topk_slots`` (0 or 1), and the factors.
            hidden_states: ``[num_tokens, hidden_size]``; only what the logits were made from.
            router_logits: ``[num_tokens, num_experts]``.
            num_token_non_padded: one integer on the device, of shape ``[]`` or ``[1]``: the tokens from it on are
                padding, and all their ids are -1. None: no token is.
            expert_location_dispatch_info: None. (With it experts have several places; such a call stays with SGLang.)

        Returns:
            ``(topk_weights, topk_ids)``, ``[num_tokens, top_k]``, fp32 and int32, new tensors. A token's ids are
            distinct and, but for the shared column, in any order. Weights of padding mean nothing.
        """
        raise NotImplementedError(f"{self.name} has no topk")

    def fused_moe(self, obj: Any, layer: Any, dispatch_output: Any) -> torch.Tensor:
        """Each token's experts, weighted and summed (Shazeer et al. 2017, arXiv:1701.06538).

        ``out[t]`` is the sum over ``k`` of ``weight[t, k] * (w2[e] @ act(w13[e] @ x[t] + w13_bias[e]) + w2_bias[e])``
        with ``e = ids[t, k]``. Gated, ``act(h) = f(h[:d]) * h[d:]``, else ``act(h) = f(h)``; ``f`` is ``silu``,
        ``gelu`` (by erf), ``gelu_tanh`` or ``relu2`` (``max(h, 0) ** 2``). What a matrix product is given, and an
        expert's weighted output, may be rounded to the activation's dtype.

        Args:
            obj: the method object of the layer; nothing of it is needed.
            layer: ``layer.w13_weight`` ``[num_local_experts, 2 * d, hidden_size]``, the gate's rows before the
                others (``[.., d, ..]`` if it is not gated), ``layer.w2_weight`` ``[num_local_experts, hidden_size, d]``,
                both in x's dtype; ``layer.w13_weight_bias`` and ``layer.w2_weight_bias``, fp32, the first two dimensions
                of their weights, or None, or not there; ``layer.moe_runner_config`` with ``activation``, ``is_gated``,
                ``num_experts``, ``num_local_experts`` (fewer where other ranks have the rest), and
                ``apply_router_weight_on_input``: ``weight`` multiplies ``w13[e] @ x[t]`` instead (never with a bias).
            dispatch_output: ``dispatch_output.hidden_states``, x, ``[num_tokens, hidden_size]``, and
                ``dispatch_output.topk_output`` with ``topk_weights``, fp32, and ``topk_ids``, int32 or int64,
                ``[num_tokens, top_k]``. An id counts this rank's experts. A negative one is an expert of another
                rank, or a padded token's: it adds nothing. The model's ``routed_scaling_factor`` is in the weights
                where this operator is to apply it.

        Returns:
            ``[num_tokens, hidden_size]`` in x's dtype, a new tensor.
        """
        raise NotImplementedError(f"{self.name} has no fused_moe")


_NOT_OPERATORS = frozenset({"is_available", "why_unavailable"})


def _operators() -> tuple[str, ...]:
    methods = inspect.getmembers(FLBackendBase, inspect.isfunction)
    return tuple(name for name, _ in methods if name not in _NOT_OPERATORS and not name.startswith("_"))


#: The operators' names.
OPERATORS: tuple[str, ...] = _operators()
