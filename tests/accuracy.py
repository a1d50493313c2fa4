# SPDX-License-Identifier: Apache-2.0
"""Operators against float64: an implementation is right if its error is what rounding must cost.

Notation: ``u(dtype)`` is the unit roundoff, half the distance from 1 to the next number. An operator
that works in fp32 and rounds once may be wrong by ``u(dtype)`` at the size of the result, plus a few
``u(fp32)`` at the size of the terms it summed; results below the smallest normal number may be wrong
by half the smallest subnormal.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U32 = torch.finfo(torch.float32).eps / 2


def u(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def assert_within(
    what: str, got: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor, roundings: float, lost: torch.Tensor | float = 0.0
) -> None:
    """``|got - exact| <= u(dtype) |exact| + roundings * u(fp32) * terms + lost``.

    Args:
        got: on any device.
        exact: float64, computed on the CPU from the same inputs.
        terms: float64, the sum of the sizes of the terms that make up each result.
        roundings: how many fp32 roundings stand between the inputs and the result.
        lost: what underflow inside may take away.
    """
    dtype = got.dtype
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    bound = u(dtype) * exact.abs() + roundings * U32 * terms * (1 + u(dtype)) + smallest(dtype) + lost
    got = got.cpu()
    error = (got.double() - exact).abs()
    bad = ~(error <= bound)
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{what} ({dtype}): {int(bad.sum())} of {bad.numel()} are out of bounds; at {where}: {got[where].item():.9g}, "
            f"exact {exact[where].item():.9g}, error {error[where].item():.3g}, bound {bound[where].item():.3g}"
        )


def exactly(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in float64 on the CPU."""
    return x.cpu().double()


class Norm:
    """What an rms_norm needs of its layer."""

    def __init__(self, weight: torch.Tensor, eps: float = 1e-6):
        self.weight = weight
        self.variance_epsilon = eps


def check_silu_and_mul(fn: Callable[..., Any], x: torch.Tensor) -> None:
    kept = x.clone()
    got = fn(None, x)
    assert torch.equal(x, kept), "silu_and_mul wrote its input"
    gate, up = exactly(x).chunk(2, dim=-1)
    exact = gate / (1 + torch.exp(-gate)) * up
    assert got.dtype == x.dtype
    # exp in fp32 turns one rounding of its argument into |gate| roundings of its result.
    # From -88.7 on exp overflows in fp32, which makes a sigmoid below 2 ** -128 zero.
    lost = (gate * up).abs() * 2.0**-127
    assert_within("silu_and_mul", got, exact, exact.abs() * (1 + gate.abs() / 8), roundings=8, lost=lost)


def check_rms_norm(fn: Callable[..., Any], layer: Norm, x: torch.Tensor, residual: torch.Tensor | None) -> None:
    hidden = exactly(x) if residual is None else exactly(x) + exactly(residual)
    exact = hidden / torch.sqrt(hidden.square().mean(-1, keepdim=True) + layer.variance_epsilon) * exactly(layer.weight)
    # Pairwise summation of n squares costs log2(n) roundings, and the square root halves them.
    roundings = 8 + math.log2(max(2, x.shape[-1]))
    if residual is None:
        kept = x.clone()
        got = fn(layer, x)
        assert torch.equal(x, kept), "rms_norm wrote x without a residual"
    else:
        got, total = fn(layer, x, residual)
        assert total.dtype == x.dtype
        assert_within("rms_norm's residual", total, hidden, hidden.abs(), roundings=2)
    assert got.dtype == x.dtype
    assert_within("rms_norm", got, exact, exact.abs(), roundings)


def check_rotary_embedding(
    fn: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inplace: bool = False,
) -> None:
    kept = query.clone(), key.clone()
    got = fn(None, query, key, cos, sin, positions, interleaved, inplace)
    if not inplace:
        assert torch.equal(query, kept[0]) and torch.equal(key, kept[1]), "rotary_embedding wrote its inputs"
    for name, x, y in zip(("query", "key"), kept, got, strict=True):
        assert y.dtype == x.dtype
        exact, terms = _rotate_exactly(exactly(x), exactly(cos), exactly(sin), positions.long().cpu(), interleaved)
        assert_within(f"rotary_embedding's {name}", y, exact, terms, roundings=4)
        rotary_dim = 2 * cos.shape[-1]
        assert torch.equal(y[..., rotary_dim:], x[..., rotary_dim:]), f"rotary_embedding changed the rest of {name}"


def _rotate_exactly(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    half = cos.shape[-1]
    pair = torch.arange(half)
    first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    a, b = x[..., first], x[..., second]
    out, terms = x.clone(), x.abs()
    out[..., first], terms[..., first] = a * c - b * s, (a * c).abs() + (b * s).abs()
    out[..., second], terms[..., second] = b * c + a * s, (b * c).abs() + (a * s).abs()
    return out, terms
