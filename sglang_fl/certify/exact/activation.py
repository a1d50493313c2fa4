# SPDX-License-Identifier: Apache-2.0
import torch

from .judge import TINY, Exact, exactly


def silu_and_mul(x: torch.Tensor) -> tuple[Exact, ...]:
    gate, up = exactly(x).chunk(2, dim=-1)
    value = gate / (1 + torch.exp(-gate)) * up
    # From -88.7 on exp overflows in fp32, which makes a sigmoid below 2 ** -128 zero.
    lost = torch.where(gate < 0, (gate * up).abs() * 2.0**-127, 0.0)
    flushed = (gate.abs() < TINY) | (up.abs() < TINY) | (value.abs() < TINY)
    lost = (lost + torch.where(flushed, value.abs(), 0.0)).nan_to_num()
    # exp in fp32 turns one rounding of its argument into |gate| roundings of its result.
    return (Exact("result", value, (value.abs() * (1 + gate.abs() / 8)).nan_to_num(), 8, lost),)
