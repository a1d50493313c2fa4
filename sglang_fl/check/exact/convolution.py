# SPDX-License-Identifier: Apache-2.0
"""The short causal convolution of hybrid models in float64: a sequence's window slides by one token at a time."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from .judge import Exact, Same, exactly

#: No sequence has it.
PADDING = -1


def _convolved(
    windows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of windows [dim, tokens, width]: the results [dim, tokens], and the sizes of their terms."""
    products = windows * exactly(weight).unsqueeze(1)
    total, terms = products.sum(-1), products.abs().sum(-1)
    if bias is not None:
        total, terms = total + exactly(bias).unsqueeze(1), terms + exactly(bias).abs().unsqueeze(1)
    # silu's slope is never above 1.1, and its own roundings are at the size of its argument.
    return (total * torch.sigmoid(total), 1.1 * terms * (1 + total.abs() / 8)) if activation else (total, terms)


class _Result:
    """Results ``[..., dim, ...]``, any number where nothing is said of one, and what states are afterwards."""

    def __init__(self, like: torch.Tensor, pool: torch.Tensor, width: int):
        self.value, self.terms = (torch.zeros(like.shape, dtype=torch.float64) for _ in range(2))
        self.lost = torch.full(like.shape, math.inf, dtype=torch.float64)
        self.pool, self._width = pool.cpu().clone(), width

    def put(self, at: tuple[object, ...], found: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.value[at], self.terms[at], self.lost[at] = *found, 0.0  # type: ignore[index]

    def all(self, shape: torch.Size) -> tuple[Exact | Same, ...]:
        out = Exact("out", self.value, self.terms, 12 + self._width, self.lost)
        return out.in_shape(*shape), Same("the pool of states", self.pool)


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pool: torch.Tensor,
    starts: Sequence[int],
    slots: Sequence[int],
    continues: Sequence[bool],
    *,
    activation: bool,
) -> tuple[Exact | Same, ...]:
    """Of x [dim, tokens], in whose sequences the padding has no result."""
    width = weight.shape[1]
    result, tokens = _Result(x, pool, width), x.cpu()
    for (start, end), slot, continued in zip(pairwise(starts), slots, continues, strict=True):
        if end > start and slot != PADDING:
            state = result.pool[slot, :, : width - 1]
            line = torch.cat([state.to(x.dtype) if continued else torch.zeros_like(state, dtype=x.dtype), tokens[:, start:end]], 1)
            result.put((slice(None), slice(start, end)), _convolved(exactly(line).unfold(1, width, 1), weight, bias, activation))
            result.pool[slot, :, : width - 1] = line[:, 1 - width :].to(pool.dtype)
    return result.all(x.shape)


def causal_conv1d_update(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pool: torch.Tensor,
    slots: Sequence[int],
    activation: bool,
    windows: torch.Tensor | None = None,
    rows: Sequence[int] = (),
    children: Sequence[Sequence[int]] = (),
    siblings: Sequence[Sequence[int]] = (),
    parents: torch.Tensor | None = None,
    accepted: Sequence[int] = (),
) -> tuple[Exact | Same, ...]:
    """Of the next tokens [batch, dim, count], or one each: they see their ancestors, which are those before where no tree is given.

    ``accepted``: of the tokens that are in the state from the last call, so many count; the new ones are all kept in it.
    """
    tokens = x.cpu() if x.dim() == 3 else x.cpu().unsqueeze(-1)
    width, count = weight.shape[1], tokens.shape[2]
    result = _Result(tokens, pool, width)
    kept, found = None if windows is None else windows.cpu().clone(), None if parents is None else parents.cpu().clone()
    for number, slot in enumerate(slots):
        if slot == PADDING:
            continue
        first, kept_columns = (accepted[number] - 1, width + count - 2) if accepted else (0, width - 1)
        state = result.pool[slot, :, first : first + width - 1].to(x.dtype)
        before = _parents(children[number], siblings[number]) if children else list(range(-1, count - 1))
        line: dict[int, torch.Tensor] = {-1: state}
        for token in range(count):
            line[token] = torch.cat([line[before[token]], tokens[number, :, token : token + 1]], 1)
            window = line[token][:, -width:]
            value, terms = _convolved(exactly(window).unsqueeze(1), weight, bias, activation)
            result.put((number, slice(None), token), (value[:, 0], terms[:, 0]))
            if kept is not None:
                kept[rows[number], token] = window[:, 1:].to(kept.dtype)
        if found is not None:
            found[number] = torch.tensor([max(0, token) for token in before])
        result.pool[slot, :, :kept_columns] = torch.cat([state, tokens[number]], 1)[:, -kept_columns:].to(pool.dtype)
    more = [("the windows after drafts", kept), ("retrieve_parent_token", found)]
    return (*result.all(x.shape), *(Same(name, tensor) for name, tensor in more if tensor is not None))


def _parents(children: Sequence[int], siblings: Sequence[int]) -> list[int]:
    """From each token's first child and next sibling."""
    found = [-1] * len(children)
    for token, child in enumerate(children):
        while child != PADDING:
            found[child], child = token, siblings[child]
    return found
