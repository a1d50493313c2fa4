# SPDX-License-Identifier: Apache-2.0
import functools
import math

import torch

from .judge import TINY, Exact, exactly


def _flushed(*numbers: torch.Tensor) -> torch.Tensor:
    """Where one of the numbers may be flushed to zero."""
    return functools.reduce(torch.logical_or, (number.abs() < TINY for number in numbers))


def with_sigmoid(exponent: torch.Tensor, v: torch.Tensor, factor: torch.Tensor, argument: int) -> tuple[Exact, ...]:
    """``sigmoid(exponent) * v * factor``, where exp and its argument cost ``argument`` roundings of the argument."""
    value = v / (1 + torch.exp(-exponent)) * factor
    # Below -88.7 exp overflows in fp32, so that a sigmoid below 2 ** -128 becomes zero.
    lost = torch.where(exponent < 0, (v * factor).abs() * 2.0**-127, 0.0)
    lost = (lost + torch.where(_flushed(v, factor, value), value.abs(), 0.0)).nan_to_num()
    # exp in fp32 turns one rounding of its argument into |exponent| roundings of its result.
    return (Exact("result", value, (value.abs() * (1 + argument * exponent.abs() / 8)).nan_to_num(), 8, lost),)


def _gelu(v: torch.Tensor, approximate: str, factor: torch.Tensor) -> tuple[Exact, ...]:
    """``v * p * factor``, where implementations compute p as ``(1 + t) / 2`` with an erf or tanh t that may cancel the 1.

    The roundings, relative to the terms ``(1 + |t|) / 2``: 2 ulp of t itself; four of its argument, of which erf and
    tanh propagate at most half (``|z| * t'(z) < 0.5``); the sum and two products.
    """
    # Neither form cancels.
    by_tanh = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))
    p = by_tanh if approximate == "tanh" else torch.erfc(-v / math.sqrt(2)) / 2
    value = v * p * factor
    terms = (v * factor).abs() * (1 + (2 * p - 1).abs()) / 2
    lost = torch.where(_flushed(v, factor, value), value.abs(), 0.0).nan_to_num()
    return (Exact("result", value, terms.nan_to_num(), 10, lost),)


def gelu_and_mul(x: torch.Tensor, approximate: str) -> tuple[Exact, ...]:
    gate, up = exactly(x).chunk(2, dim=-1)
    return _gelu(gate, approximate, up)


def new_gelu(x: torch.Tensor) -> tuple[Exact, ...]:
    wide = exactly(x)
    return _gelu(wide, "tanh", torch.ones_like(wide))


def quick_gelu(x: torch.Tensor) -> tuple[Exact, ...]:
    wide = exactly(x)
    return with_sigmoid(1.702 * wide, wide, torch.ones_like(wide), argument=3)


def relu2(x: torch.Tensor) -> tuple[Exact, ...]:
    wide = exactly(x).relu()
    value = wide.square()
    return (Exact("result", value, value, 1, torch.where(_flushed(wide, value), value, 0.0)),)


def silu_and_mul(x: torch.Tensor) -> tuple[Exact, ...]:
    gate, up = exactly(x).chunk(2, dim=-1)
    return with_sigmoid(gate, gate, up, argument=1)
