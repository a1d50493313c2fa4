# SPDX-License-Identifier: Apache-2.0
"""The short causal convolution in float64."""

import math
from itertools import pairwise

import torch

from .judge import Exact, Same, exactly

#: The number of fp32 roundings of silu, relative to its input. The sum has ``width`` more.
_SILU = 12


def _convolved(
    windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results ``[..., dim]`` of windows ``[..., dim, width]``, and the sums of the absolute terms."""
    products = windows * exactly(weight)
    total, terms = products.sum(-1), products.abs().sum(-1)
    if bias is not None:
        total, terms = total + exactly(bias), terms + exactly(bias).abs()
    if activation is None:
        return total, terms
    # silu's slope is below 1.1. One rounding of its exponent becomes |exponent| roundings of its result.
    value = total * torch.sigmoid(total)
    return value, 1.1 * terms + value.abs() * (1 + total.abs())


def _exact(value: torch.Tensor, terms: torch.Tensor, width: int, judged: torch.Tensor) -> Exact:
    """``judged``: where results are compared. Elsewhere any number is right."""
    # exp overflows in fp32 where the sigmoid is below 2 ** -128, which then becomes zero.
    lost = torch.where(judged, (terms * 2.0**-127).nan_to_num(), math.inf)
    return Exact("y", value, terms.nan_to_num(), _SILU + width, lost)


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
) -> tuple[Exact | Same, ...]:
    """``y``, and the updated pool."""
    dim, width = weight.shape
    wide, spans = exactly(x), list(pairwise(query_start_loc.tolist()))
    pool = exactly(conv_states)
    slots = list(range(len(spans))) if cache_indices is None else cache_indices.tolist()
    goes_on = [False] * len(spans) if has_initial_state is None else has_initial_state.tolist()
    value, terms, judged = torch.zeros_like(wide), torch.zeros_like(wide), torch.zeros(x.shape, dtype=torch.bool)
    for (start, end), slot, again in zip(spans, slots, goes_on, strict=True):
        if slot < 0:
            continue
        state = pool[slot, :, : width - 1] if again else torch.zeros(dim, width - 1, dtype=torch.float64)
        line = torch.cat((state, wide[:, start:end]), 1)
        found = _convolved(line.unfold(1, width, 1).transpose(0, 1), weight, bias, activation)
        value[:, start:end], terms[:, start:end] = (part.T for part in found)
        judged[:, start:end] = True
        pool[slot, :, : width - 1] = line[:, end - start :]
    return _exact(value, terms, width, judged), Same("the pool of states", pool.to(conv_states.dtype))


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
) -> tuple[Exact | Same, ...]:
    """``y``, the updated pool; with drafts also the state after each token, and with trees the parents."""
    wide, width = exactly(x if x.dim() == 3 else x.unsqueeze(-1)), weight.shape[1]
    pool, count = exactly(conv_state), wide.shape[2]
    slots = list(range(len(wide))) if conv_state_indices is None else conv_state_indices.tolist()
    behind = None if intermediate_conv_window is None else exactly(intermediate_conv_window)
    rows = [] if intermediate_state_indices is None else intermediate_state_indices.tolist()
    parents = None if retrieve_parent_token is None else retrieve_parent_token.cpu().clone()
    value, terms, judged = torch.zeros_like(wide), torch.zeros_like(wide), torch.zeros(wide.shape, dtype=torch.bool)
    for number, slot in enumerate(slots):
        if slot < 0:
            continue
        state = pool[slot, :, : width - 1].clone()
        for token in range(count):
            path = [token]
            while path[0]:
                path.insert(0, _parent(path[0], number, retrieve_next_token, retrieve_next_sibling))
            window = torch.cat((state, wide[number][:, path]), 1)[:, -width:]
            value[number, :, token], terms[number, :, token] = _convolved(window, weight, bias, activation)
            if behind is not None:
                behind[rows[number], token] = window[:, 1:]
        if parents is not None:
            found = [0, *(_parent(token, number, retrieve_next_token, retrieve_next_sibling) for token in range(1, count))]
            parents[number] = torch.tensor(found)
        judged[number] = True
        pool[slot, :, : width - 1] = torch.cat((state, wide[number]), 1)[:, count:]
    results: list[Exact | Same] = [_exact(value.view(x.shape), terms.view(x.shape), width, judged.view(x.shape))]
    results.append(Same("the pool of states", pool.to(conv_state.dtype)))
    if behind is not None and intermediate_conv_window is not None:
        results.append(Same("the states after tokens", behind.to(intermediate_conv_window.dtype)))
    if parents is not None:
        results.append(Same("retrieve_parent_token", parents))
    return tuple(results)


def _parent(token: int, row: int, children: torch.Tensor | None, siblings: torch.Tensor | None) -> int:
    """The parent of a token. Without trees it is the token before it."""
    if children is None or siblings is None:
        return token - 1
    of_children, of_siblings = children[row].tolist(), siblings[row].tolist()
    while token not in of_children:
        token = of_siblings.index(token)
    return int(of_children.index(token))
