# SPDX-License-Identifier: Apache-2.0
"""The operators: what every implementation is called with, and what it must give back.

Common to all of them:

- ``obj`` is the layer that is being computed; its weights and constants are read from it
  (``obj.weight``, ``obj.variance_epsilon``). An implementation never writes to it. Operators that stand
  for functions of SGLang have none.
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
        """The gated delta rule over whole sequences (Yang et al. 2024, arXiv:2412.06464, equation 10).

        Each of the HV heads has a state ``S`` ``[V, K]``, which each token of its sequence changes and reads::

            S = exp(g) * S
            S = S + beta * outer(v - S @ k, k)
            o = S @ (scale * q)

        Head ``i`` takes ``q`` and ``k`` of head ``i // (HV // H)``. Sums are fp32 or better. An implementation may round
        what it computes within a chunk of 64 tokens to q's dtype, as matrix units want it; and it may read
        ``cu_seqlens`` on the host: it is not called under graph capture.

        Args:
            q, k: ``[B, T, H, K]``; divided by their norm, ``sqrt(sum(x ** 2) + 1e-6)``, first if
                ``use_qk_l2norm_in_kernel``.
            v: ``[B, T, HV, V]``, HV a multiple of H; q's dtype.
            g: ``[B, T, HV]``, the logarithm of the decay, at most 0; fp32.
            beta: ``[B, T, HV]``, fp32 or q's dtype.
            scale: ``K ** -0.5`` if None.
            initial_state: ``[num_slots, HV, V, K]``, the pool of states, fp32 or of 16 bits, the slots possibly further apart
                than their size; None: states begin at zero and are not kept.
            initial_state_indices: ``[N]``, int32 or int64: the slot of each sequence, no slot twice. -1 is padding: the state
                begins at zero and is not kept. None: sequence ``i`` has slot ``i``.
            cu_seqlens: ``[N + 1]``, int32 or int64: sequence ``i`` is tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``, at least
                one unless T is 0; B is 1 then, and tokens behind the last sequence give anything. None: each of B rows is a sequence.
            inplace_update: each sequence's last state is written to its slot; False: the pool is only read.

        Returns:
            ``o`` ``[B, T, HV, V]`` in q's dtype, and the state before each chunk of 64 tokens of a sequence,
            ``[B, num_chunks, HV, V, K]`` in q's dtype, the sequences' chunks one after another.
        """
        raise NotImplementedError(f"{self.name} has no chunk_gated_delta_rule")

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
        """The gated delta rule, token after token; see :meth:`chunk_gated_delta_rule`.

        Args:
            q, k, v, g, scale, cu_seqlens, use_qk_l2norm_in_kernel: as there; sequences may have no tokens, and nothing is
                rounded but the result.
            beta: as there; None: 1.
            initial_state: ``[N, HV, V, K]``, one for each sequence, only read; None: zero.
            output_final_state: whether the last states are wanted.

        Returns:
            ``o`` ``[B, T, HV, V]`` in q's dtype, and the last states ``[N, HV, V, K]`` in fp32, a new tensor, or None.
        """
        raise NotImplementedError(f"{self.name} has no fused_recurrent_gated_delta_rule")

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
        """One token of each sequence by the gated delta rule, gates included; see :meth:`chunk_gated_delta_rule`.

        ``g = -exp(A_log) * softplus(a + dt_bias)``, with ``softplus(x) = log(1 + exp(x))``, and ``beta = sigmoid(b)``, which may
        be rounded to b's dtype.

        Args:
            mixed_qkv: ``[B, 2 * H * K + HV * V]``: q, k and v of a token, heads one after another; the last dimension contiguous.
            a, b: ``[B, HV]``, the last dimension contiguous.
            A_log, dt_bias: ``[HV]``, possibly of other dtypes.
            scale: of q.
            initial_state: ``[num_slots, HV, V, K]``, the pool of states, fp32 or of 16 bits, the slots possibly further apart
                than their size. Each sequence's slot is written.
            out: ``[B, 1, HV, V]``, contiguous, mixed_qkv's dtype. Written.
            ssm_state_indices: ``[B]``, int32 or int64: the slot of each sequence, no slot twice. -1 is padding: its row of
                ``out`` becomes zero, and no slot is touched.
            use_qk_l2norm_in_kernel: whether q and k are divided by their norms.

        Returns:
            ``(out, initial_state)``.
        """
        raise NotImplementedError(f"{self.name} has no fused_recurrent_gated_delta_rule_packed_decode")


_NOT_OPERATORS = frozenset({"is_available", "why_unavailable"})


def _operators() -> tuple[str, ...]:
    methods = inspect.getmembers(FLBackendBase, inspect.isfunction)
    return tuple(name for name, _ in methods if name not in _NOT_OPERATORS and not name.startswith("_"))


#: The operators' names.
OPERATORS: tuple[str, ...] = _operators()
