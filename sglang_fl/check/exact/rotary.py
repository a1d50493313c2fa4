# SPDX-License-Identifier: Apache-2.0
import torch

from .judge import TINY, Exact, exactly


def rotary_embedding(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor, rotary_interleaved: bool
) -> tuple[Exact, ...]:
    rows = position_ids.detach().cpu().long()
    c, s = (exactly(table.cpu()[rows]).unsqueeze(1) for table in (cos, sin))
    return tuple(_rotated(name, exactly(x), c, s, rotary_interleaved) for name, x in (("query", query), ("key", key)))


def mrotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    axis_map: torch.Tensor,
    head_size: int,
    is_neox_style: bool,
) -> tuple[Exact, ...]:
    """positions ``[num_tokens]`` or ``[3, num_tokens]``; query and key with or without a dimension of heads."""
    rows, axes, table = positions.detach().cpu().long().expand(3, -1), axis_map.detach().cpu().tolist(), cos_sin_cache.cpu()
    half = len(axes)
    # Computed pair by pair, unlike any implementation.
    c, s = (
        exactly(torch.stack([part[rows[axis], i] for i, axis in enumerate(axes)], -1)[:, None])
        for part in (table[:, :half], table[:, half:])
    )
    results = []
    for name, x in (("query", query), ("key", key)):
        rotated = _rotated(name, exactly(x).flatten(1).unflatten(1, (-1, head_size)), c, s, not is_neox_style)
        # In a row of several heads numbers pass through unchanged only if heads are partially rotated.
        results.append(rotated if x.dim() == 3 else rotated.in_shape(*x.shape))
    return tuple(results)


def _rotated(name: str, x: torch.Tensor, c: torch.Tensor, s: torch.Tensor, interleaved: bool) -> Exact:
    half = c.shape[-1]
    pair = torch.arange(half)
    first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
    a, b = x[..., first], x[..., second]
    value, terms = x.clone(), x.abs()
    for place, one, other in ((first, a * c, -b * s), (second, b * c, a * s)):
        value[..., place], terms[..., place] = one + other, one.abs() + other.abs()
    # Cosines are at most 1, or 2 if a model scales them: flushing removes at most four times the smallest normal number.
    lost = terms.clamp(max=4 * TINY)
    return Exact(name, value, terms, 4, lost, passed_on=2 * half)
