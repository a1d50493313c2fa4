# SPDX-License-Identifier: Apache-2.0
"""The short causal convolution, in fp32. Pools are written last."""

from itertools import pairwise

import torch
from torch.nn.functional import silu

from ... import state_pool
from ...checks import slots_of


def _convolved(windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """The results ``[..., dim, tokens]``, in the dtype of ``windows``, which have ``width - 1`` more tokens at their start."""
    width = weight.shape[1]
    tokens = windows.shape[-1] - width + 1
    wide, weight = windows.float(), weight.float()
    y = torch.zeros_like(wide[..., :tokens])
    for j in range(width):
        y = y + wide[..., j : j + tokens] * weight[:, j : j + 1]
    if bias is not None:
        y = y + bias.float().unsqueeze(1)
    return (silu(y) if activation else y).to(windows.dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def causal_conv1d_fn(
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
    out, before = torch.zeros_like(x), weight.shape[1] - 1
    spans = list(pairwise(query_start_loc.tolist()))
    slots = slots_of("causal_conv1d_fn", cache_indices, len(spans), x.device)
    states = x.new_zeros(len(spans), len(x), before)
    if has_initial_state is not None:
        kept = state_pool.read(conv_states[..., :before], slots, x.dtype)
        states = torch.where(has_initial_state[:, None, None], kept, states)
    last = []
    for state, (start, end) in zip(states, spans, strict=True):
        window = torch.cat((state, x[:, start:end]), 1)
        out[:, start:end] = _convolved(window, weight, bias, activation)
        last.append(window[:, end - start :])
    if last:
        slots = torch.where(query_start_loc.diff() > 0, slots, -1)
        state_pool.write(conv_states[..., :before], slots, torch.stack(last))
    return out


def causal_conv1d_update(
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
    """Graphs can capture it, since it does not synchronise with the host, except for trees."""
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    before, count = weight.shape[1] - 1, tokens.shape[2]
    slots = slots_of("causal_conv1d_update", conv_state_indices, len(tokens), x.device)
    pool = conv_state[..., :before]
    window = torch.cat((state_pool.read(pool, slots, x.dtype), tokens), 2)
    if retrieve_next_token is None or retrieve_next_sibling is None:
        windows = [window[..., token : token + before + 1] for token in range(count)]
        out = _convolved(window, weight, bias, activation)
    else:
        parents = _parents(count, retrieve_next_token, retrieve_next_sibling)
        if retrieve_parent_token is not None:
            given = retrieve_parent_token[: len(tokens), :count]
            given.copy_(torch.where((slots < 0).unsqueeze(1), given, parents))
        windows = _along_the_tree(window, before, parents)
        out = torch.cat([_convolved(each, weight, bias, activation) for each in windows], 2)
    if intermediate_conv_window is not None and intermediate_state_indices is not None:
        rows = torch.where(slots < 0, -1, intermediate_state_indices)
        for token, each in enumerate(windows):
            state_pool.write(intermediate_conv_window[:, token], rows, each[..., 1:])
    state_pool.write(pool, slots, window[..., count:])
    return out.squeeze(-1) if x.dim() == 2 else out


def _parents(count: int, children: torch.Tensor, siblings: torch.Tensor) -> torch.Tensor:
    """The parent of each token, ``[batch, count]``, 0 for the root."""
    found = []
    for row in torch.stack((children[:, :count], siblings[:, :count]), 2).tolist():
        parent = [0] * count
        for token, (child, sibling) in enumerate(row):
            if child != -1:
                parent[child] = token
            if sibling != -1:
                parent[sibling] = parent[token]
        found.append(parent)
    return torch.tensor(found, dtype=children.dtype, device=children.device).view(-1, count)


def _along_the_tree(window: torch.Tensor, before: int, parents: torch.Tensor) -> list[torch.Tensor]:
    """For each token the last ``before`` tokens on its path from the root, and itself: ``[batch, dim, before + 1]``."""
    rows = torch.arange(len(window), device=window.device)
    behind = [window[..., 1 : before + 1]]
    found = [window[..., : before + 1]]
    for token in range(1, parents.shape[1]):
        states = torch.stack(behind)[parents[:, token].long(), rows]
        found.append(torch.cat((states, window[..., before + token : before + token + 1]), 2))
        behind.append(found[-1][..., 1:])
    return found
