# SPDX-License-Identifier: Apache-2.0
"""The short causal convolution of hybrid models: over concatenated sequences, and over the next tokens of each sequence.

A sequence's state is its previous ``width - 1`` tokens, [dim, width - 1], in a slot of a pool. Arithmetic is in fp32.
"""

from typing import Any

import torch
from torch.nn.functional import silu

PAD_SLOT_ID = -1


def _convolved(window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | bool | None) -> torch.Tensor:
    """Convolve a window that begins with ``width - 1`` extra tokens: [dim, tokens]."""
    width = weight.shape[1]
    tokens = window.shape[1] - width + 1
    window, weight = window.float(), weight.float()
    y = torch.zeros_like(window[:, :tokens]) if bias is None else bias.float().unsqueeze(1)
    for j in range(width):
        y = y + window[:, j : j + tokens] * weight[:, j : j + 1]
    return silu(y) if activation else y


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: list[int],
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | bool | None = "silu",
    pad_slot_id: int | None = PAD_SLOT_ID,
    validate_data: bool = False,
    block_table: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Convolve whole sequences, [dim, tokens], and save each state in its slot. Padding and empty sequences write nothing."""
    out, before = torch.zeros_like(x), weight.shape[1] - 1
    starts = query_start_loc.tolist()
    slots = list(range(len(starts) - 1)) if cache_indices is None else cache_indices.tolist()
    continues = [False] * len(slots) if has_initial_state is None else has_initial_state.tolist()
    for slot, start, end, continued in zip(slots, starts, starts[1:], continues, strict=False):
        if end <= start or (pad_slot_id is not None and slot == pad_slot_id):
            continue
        tokens = x[:, start:end]
        state = tokens.new_zeros(len(x), before) if conv_states is None or not continued else conv_states[slot, :, :before]
        out[:, start:end] = _convolved(torch.cat([state.to(x.dtype), tokens], 1), weight, bias, activation).to(x.dtype)
        if conv_states is not None:
            conv_states[slot, :, :before] = torch.cat([state.to(conv_states.dtype), tokens.to(conv_states.dtype)], 1)[:, end - start :]
    return out


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    num_accept_tokens: torch.Tensor | None = None,
    intermediate_conv_window: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    retrieve_next_token: torch.Tensor | None = None,
    retrieve_next_sibling: torch.Tensor | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    pad_slot_id: int | None = PAD_SLOT_ID,
    metadata: Any = None,
    validate_data: bool = False,
) -> torch.Tensor:
    """Convolve each sequence's next tokens, [batch, dim] or [batch, dim, tokens].

    Draft tokens may form a tree (``retrieve_next_token``, ``retrieve_next_sibling``). Each continues from its parent, which is
    written to ``retrieve_parent_token``. ``intermediate_conv_window``, [slots, tokens, dim, width - 1], receives the state after each
    token. ``num_accept_tokens``: how many of the tokens that the previous call added to the state were accepted.
    """
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    out, before, count = torch.zeros_like(tokens), weight.shape[1] - 1, tokens.shape[2]
    slots = list(range(len(tokens))) if conv_state_indices is None else conv_state_indices.tolist()
    for row, slot in enumerate(slots[: len(tokens)]):
        if pad_slot_id is not None and slot == pad_slot_id:
            continue
        skipped = 0 if num_accept_tokens is None else int(num_accept_tokens[row]) - 1
        state = conv_state[slot, :, skipped : skipped + before].clone()
        new = tokens[row].to(conv_state.dtype)
        if num_accept_tokens is None:
            conv_state[slot, :, :before] = torch.cat([state, new], 1)[:, count:]
        else:
            conv_state[slot, :, : before + count - 1] = torch.cat([state[:, 1:], new], 1)
        paths = _paths(row, count, retrieve_next_token, retrieve_next_sibling, retrieve_parent_token)
        for token, path in enumerate(paths):
            window = torch.cat([state.to(x.dtype), tokens[row][:, path]], 1)[:, len(path) - 1 :]
            out[row, :, token] = _convolved(window, weight, bias, activation)[:, 0].to(x.dtype)
            if intermediate_conv_window is not None:
                assert intermediate_state_indices is not None
                intermediate_conv_window[int(intermediate_state_indices[row]), token] = window[:, 1:].to(intermediate_conv_window.dtype)
    return out.squeeze(-1) if x.dim() == 2 else out


def _paths(
    row: int, count: int, children: torch.Tensor | None, siblings: torch.Tensor | None, parents: torch.Tensor | None
) -> list[list[int]]:
    """For each token, its path from the root, itself included."""
    if children is None:
        return [list(range(token + 1)) for token in range(count)]
    assert siblings is not None and parents is not None
    parent = [0] * count
    for token, (child, sibling) in enumerate(zip(children[row, :count].tolist(), siblings[row, :count].tolist(), strict=True)):
        if child != -1:
            parent[child] = token
        if sibling != -1:
            parent[sibling] = parent[token]
    parents[row, :count] = torch.tensor(parent, dtype=parents.dtype, device=parents.device)
    paths: list[list[int]] = []
    for token in range(count):
        path = [token]
        while path[0] > 0:
            path.insert(0, parent[path[0]])
        paths.append(path)
    return paths
