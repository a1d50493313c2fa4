# SPDX-License-Identifier: Apache-2.0
"""The operators of the short causal convolution, a part of :class:`sglang_fl.dispatch.ops.FLBackendBase`.

They replace functions of SGLang and have no layer. The rules for all operators are in ``ops``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class CausalConv1dOps:
    def causal_conv1d_fn(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        conv_states: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens_cpu: list[int],
        cache_indices: torch.Tensor | None = None,
        has_initial_state: torch.Tensor | None = None,
        activation: str | None = "silu",
    ) -> torch.Tensor:
        """A causal convolution of each channel over ``width`` tokens, for whole sequences (Gu and Dao 2023, arXiv:2312.00752).

        ``y[c, t] = act(bias[c] + sum over j of weight[c, j] * x[c, t - width + 1 + j])``, where the tokens before a sequence's
        first are its state, or zero. SGLang calls it in prefill, and never under graph capture.

        Args:
            x: ``[dim, num_tokens]``, the sequences concatenated; contiguous, or the transpose of a contiguous tensor or slice.
            weight: ``[dim, width]``, width 2 or more, x's dtype.
            bias: ``[dim]``, x's dtype, or None.
            conv_states: ``[num_slots, dim, width - 1]`` or longer, x's dtype: the pool of states. Slots and channels may be further
                apart than their size. Each sequence writes its last ``width - 1`` tokens; a shorter one keeps the end of its state.
            query_start_loc: ``[N + 1]``, int32: sequence ``i`` is tokens ``query_start_loc[i]`` to ``query_start_loc[i + 1]``, one or more.
            seq_lens_cpu: the lengths of the sequences, on the host.
            cache_indices: ``[N]``, int32 or int64: the slot of each sequence, no slot twice. -1 is padding: no slot is read or written,
                and the results of its tokens may be anything. None: sequence ``i`` has slot ``i``.
            has_initial_state: ``[N]``, bool: whether a sequence starts from its slot's state, or from zero. None: all from zero.
            activation: ``"silu"`` or None.

        Returns:
            ``y``, a new tensor of x's shape and dtype. Results after the last sequence may be anything.
        """
        raise NotImplementedError(f"{type(self).__name__} has no causal_conv1d_fn")

    def causal_conv1d_update(
        self,
        x: torch.Tensor,
        conv_state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        conv_state_indices: torch.Tensor | None = None,
        intermediate_conv_window: torch.Tensor | None = None,
        intermediate_state_indices: torch.Tensor | None = None,
        retrieve_next_token: torch.Tensor | None = None,
        retrieve_next_sibling: torch.Tensor | None = None,
        retrieve_parent_token: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The convolution for the next tokens of each sequence: decode, and the verification of drafted tokens.

        Args:
            x: ``[batch, dim]``, or ``[batch, dim, num_tokens]``.
            conv_state: ``[num_slots, dim, width - 1]`` or longer, as in :meth:`causal_conv1d_fn`. Each sequence's slot is updated as
                if its tokens were consecutive, with trees too.
            weight, bias, activation: as in :meth:`causal_conv1d_fn`.
            conv_state_indices: ``[batch]``, int32 or int64: the slot of each sequence, no slot twice. -1 is padding: nothing is read or
                written for it, and its results may be anything. None: sequence ``i`` has slot ``i``.
            intermediate_conv_window: ``[rows, num_tokens, dim, width - 1]``: receives the state after each token.
            intermediate_state_indices: ``[batch]``: each sequence's row of ``intermediate_conv_window``.
            retrieve_next_token, retrieve_next_sibling: ``[batch, num_tokens]`` or longer: the first child and the next sibling of each
                token, -1 if it has none. The tokens form a tree with the first as root. None: each token follows the one before it.
            retrieve_parent_token: ``[batch, num_tokens]`` or longer: receives the parent of each token, 0 for the root.

        Returns:
            ``y``, a new tensor of x's shape and dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no causal_conv1d_update")
