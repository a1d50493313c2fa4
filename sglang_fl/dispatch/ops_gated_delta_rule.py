# SPDX-License-Identifier: Apache-2.0
"""The operators of the gated delta rule, a part of :class:`sglang_fl.dispatch.ops.FLBackendBase`.

They replace functions of SGLang and have no layer. What is common to all operators is in ``ops``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class GatedDeltaRuleOps:
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
            initial_state_indices: ``[N]``, int32 or int64: the slot of each sequence; no slot twice with ``inplace_update``, while
                sequences that only read may share one. -1 is padding: the state begins at zero and is not kept. None:
                sequence ``i`` has slot ``i``.
            cu_seqlens: ``[N + 1]``, int32 or int64: sequence ``i`` is tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``, at least
                one unless T is 0; B is 1 then, and tokens behind the last sequence give anything. None: each of B rows is a sequence.
            inplace_update: each sequence's last state is written to its slot; False: the pool is only read.

        Returns:
            ``o`` ``[B, T, HV, V]`` in q's dtype, and the state before each chunk of 64 tokens of a sequence,
            ``[B, num_chunks, HV, V, K]`` in q's dtype, the sequences' chunks one after another.
        """
        raise NotImplementedError(f"{type(self).__name__} has no chunk_gated_delta_rule")

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
        raise NotImplementedError(f"{type(self).__name__} has no fused_recurrent_gated_delta_rule")

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
        raise NotImplementedError(f"{type(self).__name__} has no fused_recurrent_gated_delta_rule_packed_decode")

    def fused_sigmoid_gating_delta_rule_update(
        self,
        A_log: torch.Tensor,
        a: torch.Tensor,
        dt_bias: torch.Tensor,
        softplus_beta: float,
        softplus_threshold: float,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        b: torch.Tensor,
        initial_state_source: torch.Tensor,
        initial_state_indices: torch.Tensor,
        scale: float | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        disable_state_update: bool = False,
        intermediate_states_buffer: torch.Tensor | None = None,
        intermediate_state_indices: torch.Tensor | None = None,
        cache_steps: int | None = None,
        retrieve_parent_token: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gated delta rule for the next tokens of each sequence, with its gates: decode, and the verification of drafted tokens.

        The gates are those of :meth:`fused_recurrent_gated_delta_rule_packed_decode`, without rounding.

        Args:
            A_log, dt_bias: ``[HV]``; their dtypes may differ from q's.
            a, b: ``[B * T, HV]`` or ``[B, T, HV]``, the last dimension contiguous.
            softplus_beta, softplus_threshold: always 1 and 20; above 20 ``softplus(x)`` may be ``x``.
            q, k: ``[B, T, H, K]``, heads and K contiguous.
            v: ``[B, T, HV, V]``, heads and V contiguous, HV a multiple of H; q's dtype.
            initial_state_source: ``[num_slots, HV, V, K]``, fp32, bf16 or fp16: the pool of states. Slots may be further apart than
                their size.
            initial_state_indices: ``[N]``, int32 or int64: the slot of each sequence, no slot twice. -1 is padding: its state starts
                at zero and is not stored.
            scale: q is multiplied by it. None: ``K ** -0.5``.
            use_qk_l2norm_in_kernel: whether q and k are divided by their norms.
            cu_seqlens: ``[N + 1]``, int32 or int64, with B = 1: sequence ``i`` is tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``,
                possibly none. None: each of the B rows is a sequence.
            disable_state_update: the pool is not updated.
            intermediate_states_buffer: ``[rows, steps, HV, V, K]``: receives the state after each token.
            intermediate_state_indices: ``[N]``: each sequence's row of ``intermediate_states_buffer``. -1: nothing is written.
            cache_steps: ``steps`` of ``intermediate_states_buffer``.
            retrieve_parent_token: ``[N, steps]`` or longer, with an fp32 buffer: the parent of each token in a tree of drafted
                tokens, whose root is the first. None: each token follows the one before it.

        Returns:
            ``o`` ``[B, T, HV, V]``, a new tensor of q's dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no fused_sigmoid_gating_delta_rule_update")
