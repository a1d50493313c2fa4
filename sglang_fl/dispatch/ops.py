# SPDX-License-Identifier: Apache-2.0
"""The operators: what every implementation is called with, and what it must give back.

Common to all of them:

- ``obj`` is the layer that is being computed, or stands for it; its weights and constants are read from it
  by the names that the operator's text gives (``obj.weight``, ``obj.variance_epsilon``). An
  implementation never writes to it.
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
            obj: the layer: ``obj.weight`` ``[hidden_size]``, possibly of another dtype than x, and
                ``obj.variance_epsilon``, a float.
            x: ``[..., hidden_size]``. Written only if there is a residual.
            residual: the shape and dtype of x, or None. May be written.

        Returns:
            Without residual ``y``, a new tensor; with it ``(y, h)``, both in x's dtype, in the
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


_NOT_OPERATORS = frozenset({"is_available", "why_unavailable"})


def _operators() -> tuple[str, ...]:
    methods = inspect.getmembers(FLBackendBase, inspect.isfunction)
    return tuple(name for name, _ in methods if name not in _NOT_OPERATORS and not name.startswith("_"))


#: The operators' names.
OPERATORS: tuple[str, ...] = _operators()
