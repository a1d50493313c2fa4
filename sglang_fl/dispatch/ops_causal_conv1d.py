# SPDX-License-Identifier: Apache-2.0
"""The operators of the short causal convolution, a part of :class:`sglang_fl.dispatch.ops.FLBackendBase`.

They replace functions of SGLang and have no layer. What is common to all operators is in ``ops``.
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
        """A convolution of each channel with the ``width`` last tokens, over whole sequences (Gu and Dao 2023, arXiv:2312.00752).

        ``y[c, t] = act(bias[c] + sum over j of weight[c, j] * x[c, t - width + 1 + j])``, where tokens before a sequence's first are its
        state, or zero. It is called where SGLang prefills, and not under graph capture.

        Args:
            x: ``[dim, num_tokens]``, the sequences one after another; tokens of a row of memory, or channels.
            weight: ``[dim, width]``, width 2 or more, in x's dtype.
            bias: ``[dim]``, likewise, or None.
            conv_states: ``[num_slots, dim, width - 1]`` or longer, the pool of states in x's dtype, slots and channels possibly further
                apart than their size. Each sequence leaves its last ``width - 1`` tokens there, its state's before them.
            query_start_loc: ``[N + 1]``, int32: sequence ``i`` is tokens ``query_start_loc[i]`` to ``query_start_loc[i + 1]``, one or more.
            seq_lens_cpu: how many they are, on the host.
            cache_indices: ``[N]``, int32 or int64: the slot of each sequence, no slot twice. -1 is padding: no slot is touched, and the
                results of its tokens may be anything. None: sequence ``i`` has slot ``i``.
            has_initial_state: ``[N]``, bool: whether a sequence goes on from its slot, or begins at zero. None: all begin at zero.
            activation: ``"silu"`` or None.

        Returns:
            ``y``, x's shape and dtype, a new tensor. Tokens behind the last sequence may be anything.
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
        """The same over the next tokens of each sequence: decode, and the verification of drafts.

        Args:
            x: ``[batch, dim]``, or ``[batch, dim, num_tokens]``.
            conv_state: ``[num_slots, dim, width - 1]`` or longer, as above. Each sequence's slot is written, as if its tokens followed each
                other.
            weight, bias, activation: as above.
            conv_state_indices: ``[batch]``, int32 or int64: the slot of each sequence, no slot twice. -1 is padding: nothing is touched,
                and its results may be anything. None: sequence ``i`` has slot ``i``.
            intermediate_conv_window: ``[rows, num_tokens, dim, width - 1]``: gets the state behind each token. With
                ``intermediate_state_indices``, ``[batch]``: the row of each sequence.
            retrieve_next_token, retrieve_next_sibling: ``[batch, num_tokens]`` or longer: a token's first child and its next sibling, -1:
                none. Tokens then form a tree, whose root is the first: each follows its parent. None: each follows the one before.
            retrieve_parent_token: ``[batch, num_tokens]`` or longer: gets each token's parent, 0 for the
                root.

        Returns:
            ``y``, x's shape and dtype, a new tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} has no causal_conv1d_update")
