# SPDX-License-Identifier: Apache-2.0
"""The operators: the arguments and results of every implementation.

Rules for all of them, which ``sglang-fl check`` verifies:

- ``obj`` is the layer, or an object with its weights and constants, under the names that the operator's docstring gives
  (``obj.weight``, ``obj.variance_epsilon``). An implementation never writes to it. Operators that replace functions of
  SGLang have no ``obj``.
- Activations are fp32, bf16 or fp16, all of one call in one dtype and on one device. A result has the dtype and
  device of its input, and the shape that is stated.
- Any dimension of the activations but the last may be 0 (no tokens): the results are then empty, and nothing raises.
- Any input may be non-contiguous: a slice of a wider tensor, every other row, a transposed or an expanded one. Memory
  between its elements must not be written. A result may be contiguous or not.
- Arithmetic inside is fp32 or better, from the inputs as they are; only the result is rounded, once, to its dtype: it
  may be off by half a unit of its last place, and by a few roundings of fp32 at the size of the terms summed
  (``sglang_fl/check/exact`` has each operator's bound).
- nan and infinity appear exactly where the arithmetic produces them. Numbers below fp32's smallest normal one may be
  flushed to zero; fp16's own denormals may not.
- Inputs are read-only, unless an operator's docstring allows writing them. A result is in new memory or, where that is
  allowed, in an input's memory; never in a buffer that the next call writes again. The caller uses only what is returned.
- PyTorch's process-wide state does not change: default dtype and device, recording of gradients, number of threads,
  deterministic algorithms, random generators. Values derived from an input are not used in a later call: another tensor
  may have its address.
- The same inputs give the same bits each time, also from several threads at once.
- An implementation works under graph capture where its device has graphs, and under ``torch.compile``: no
  synchronisation with the host, no allocation outside the framework's allocator, no shape that depends on data.
- A call that it cannot compute is refused with ValueError, TypeError or NotImplementedError, before anything is written.
  bf16 on the shapes of serving must not be refused. After a :class:`~sglang_fl.dispatch.Refusal` (a ValueError) the next
  implementation is called; after another error only if the implementation is declared not to write its inputs.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from .ops_causal_conv1d import CausalConv1dOps
from .ops_gated_delta_rule import GatedDeltaRuleOps

if TYPE_CHECKING:
    import torch


class FLBackendBase(GatedDeltaRuleOps, CausalConv1dOps, ABC):
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
            x: ``[..., 2 * d]``, one dimension or more. Not written.

        Returns:
            ``[..., d]``, a new tensor.

        Raises:
            ValueError: the last dimension is odd.
        """
        raise NotImplementedError(f"{self.name} has no silu_and_mul")

    def gelu_and_mul(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        """GELU of the first half of the last dimension, times the second half.

        ``out[..., i] = gelu(x[..., i]) * x[..., d + i]`` (Shazeer 2020, arXiv:2002.05202, GEGLU), with
        ``gelu(v) = v / 2 * (1 + erf(v / sqrt(2)))``, or its approximation
        ``v / 2 * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 * v ** 3)))`` (Hendrycks and Gimpel 2016, arXiv:1606.08415).

        Args:
            obj: the layer: ``obj.approximate`` is ``"none"`` or ``"tanh"``.
            x: ``[..., 2 * d]``.

        Returns:
            ``[..., d]``, a new tensor.
        """
        raise NotImplementedError(f"{self.name} has no gelu_and_mul")

    def new_gelu(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        """GELU of each number, by the tanh of :meth:`gelu_and_mul`.

        Args:
            obj: the layer; nothing of it is needed.
            x: any shape.

        Returns:
            x's shape, a new tensor.
        """
        raise NotImplementedError(f"{self.name} has no new_gelu")

    def quick_gelu(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        """``v * sigmoid(1.702 * v)`` of each number, an approximation of GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).

        Args:
            obj: the layer; nothing of it is needed.
            x: any shape.

        Returns:
            x's shape, a new tensor.
        """
        raise NotImplementedError(f"{self.name} has no quick_gelu")

    def relu2(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        """``max(0, v) ** 2`` of each number (So et al. 2021, arXiv:2109.08668). That of nan is nan or 0, as the device's max has it.

        Args:
            obj: the layer; nothing of it is needed.
            x: any shape.

        Returns:
            x's shape, a new tensor.
        """
        raise NotImplementedError(f"{self.name} has no relu2")

    def rms_norm(self, obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Root mean square normalisation over the last dimension, after adding the residual if there is one.

        ``y = h / sqrt(mean(h ** 2) + eps) * weight`` with ``h = x`` or ``h = x + residual``
        (Zhang and Sennrich 2019, arXiv:1910.07467). ``h`` is not rounded before it is normalised.

        Args:
            obj: the layer: ``obj.weight`` ``[hidden_size]``, fp32, bf16 or fp16, possibly of another dtype than x
                and not contiguous, and ``obj.variance_epsilon``, a float, 0 or more.
            x: ``[..., hidden_size]``, one dimension or more; any hidden_size, odd ones and 1 included. May be written
                only if there is a residual.
            residual: the shape and dtype of x, with strides of its own, or None. May be written.

        Returns:
            Without residual ``y``, a new tensor; with it ``(y, h)``, both in x's shape and dtype, in the
            storage of x and residual or in new tensors.
        """
        raise NotImplementedError(f"{self.name} has no rms_norm")

    def gemma_rms_norm(
        self, obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """:meth:`rms_norm` with ``1 + weight`` in the place of the weight.

        ``y = h / sqrt(mean(h ** 2) + eps) * (1 + weight)`` with ``h = x`` or ``h = x + residual``, neither ``h`` nor
        ``1 + weight`` rounded to the activation's dtype (Gemma Team 2024, arXiv:2403.08295, and its published code).

        Args:
            obj: the layer: ``obj.weight`` ``[hidden_size]``, possibly of another dtype than x, and
                ``obj.variance_epsilon``, a float.
            x: ``[..., hidden_size]``. Written only if there is a residual.
            residual: the shape and dtype of x, or None. May be written.

        Returns:
            Without residual ``y``, a new tensor; with it ``(y, h)``, both in x's dtype, in the
            storage of x and residual or in new tensors.
        """
        raise NotImplementedError(f"{self.name} has no gemma_rms_norm")

    def layer_norm(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        """Normalisation over the last dimension by its mean and its variance.

        ``y = (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps) * weight + bias`` (Ba et al. 2016,
        arXiv:1607.06450). The variance is not taken as ``mean(x ** 2) - mean(x) ** 2``, which
        cancels where the mean is large.

        Args:
            obj: the layer: ``obj.weight`` and ``obj.bias`` ``[hidden_size]``, of one dtype, possibly another
                than x, and ``obj.variance_epsilon``, a float.
            x: ``[..., hidden_size]``.

        Returns:
            ``y``, in x's shape and dtype, a new tensor.
        """
        raise NotImplementedError(f"{self.name} has no layer_norm")

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
            query: ``[num_tokens, num_heads, head_dim]``, the last dimension contiguous; often a part of one packed
                projection with key and value.
            key: ``[num_tokens, num_kv_heads, head_dim]``, the last dimension contiguous; any number of heads.
            cos, sin: ``[max_position, rotary_dim / 2]``, fp32, bf16 or fp16, possibly of another dtype than query and
                not contiguous (two halves of one cache); ``rotary_dim`` is even and at most ``head_dim``. Not written.
            position_ids: ``[num_tokens]``, int32 or int64, in any order, each below ``max_position``: the rows of cos
                and sin. Not written.
            rotary_interleaved: which numbers make a pair.
            inplace: True allows writing query and key; False forbids it.

        Returns:
            ``(query, key)`` rotated, in their shapes and dtypes: in the storage of query and key if ``inplace``, or
            in new tensors. The numbers from ``rotary_dim`` on are the input's, bit for bit.
        """
        raise NotImplementedError(f"{self.name} has no rotary_embedding")

    def mrotary_embedding(
        self, obj: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary position embedding of query and key with multimodal sections (Wang et al. 2024, arXiv:2409.12191).

        As :meth:`rotary_embedding`, but a token may have three positions: in time, height and width. Pair ``i`` of a
        head's numbers then turns by the angle of ``positions[axis_map[i]]``.

        Args:
            obj: the layer: ``obj.cos_sin_cache`` ``[max_position, rotary_dim]``, the cosines in its first half and the
                sines in its second, fp32, bf16 or fp16, possibly of another dtype than query; ``obj.head_size``, with
                ``rotary_dim <= head_size``; ``obj.is_neox_style``: True if pair ``i`` is ``(i, i + rotary_dim / 2)``,
                False if it is ``(2 * i, 2 * i + 1)``; ``obj.axis_map`` ``[rotary_dim / 2]``, int64: 0, 1 or 2 for each
                pair, None where positions have one row. ``obj.mrope_section`` (t, h, w) and ``obj.mrope_interleaved``
                say the same, for kernels that want it so: without ``mrope_interleaved`` the first t pairs are time's,
                the next h height's, the rest width's; with it pair ``3 * j + 1`` is height's for ``j < h``, pair
                ``3 * j + 2`` width's for ``j < w``, and the others time's.
            positions: ``[num_tokens]``, or ``[3, num_tokens]`` if there is an ``axis_map``; int32 or int64, each below
                ``max_position``. Not written.
            query: ``[num_tokens, num_heads * head_size]`` or ``[num_tokens, num_heads, head_size]``, the last
                dimension contiguous; often a part of one packed projection with key and value. May be written.
            key: likewise, with any number of heads. May be written.

        Returns:
            ``(query, key)`` rotated, in their shapes and dtypes, in the storage of query and key or in new tensors.
            The numbers of a head from ``rotary_dim`` on are the input's, bit for bit.
        """
        raise NotImplementedError(f"{self.name} has no mrotary_embedding")

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
            ``(topk_weights, topk_ids)``, ``[num_tokens, top_k]``, fp32 and int32, new tensors, both contiguous: SGLang's
            experts read them as such. A token's ids are distinct and, but for the shared column, in any order. Weights
            of padding mean nothing; where logits are nan, ids are those of experts all the same.
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
                ``dispatch_output.topk_output`` with ``topk_weights``, fp32 or x's dtype, and ``topk_ids``, int32 or int64,
                ``[num_tokens, top_k]``. An id counts this rank's experts. A negative one is an expert of another
                rank, or a padded token's: it adds nothing. The model's ``routed_scaling_factor`` is in the weights
                where this operator is to apply it.

        Returns:
            ``[num_tokens, hidden_size]`` in x's dtype, a new tensor.
        """
        raise NotImplementedError(f"{self.name} has no fused_moe")


_METHODS = dict(inspect.getmembers(FLBackendBase, inspect.isfunction))
#: The operators' names.
OPERATORS: tuple[str, ...] = tuple(name for name in _METHODS if name not in ("is_available", "why_unavailable"))
