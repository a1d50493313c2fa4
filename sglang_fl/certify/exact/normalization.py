# SPDX-License-Identifier: Apache-2.0
import math

import torch

from .judge import TINY, Exact, exactly


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None) -> tuple[Exact, ...]:
    hidden = exactly(x) if residual is None else exactly(x) + exactly(residual)
    value = hidden / torch.sqrt(hidden.square().mean(-1, keepdim=True) + eps) * exactly(weight)
    # Pairwise summation of n squares costs log2(n) roundings, and the square root halves them.
    roundings = 8 + math.log2(max(2, x.shape[-1]))
    lost = torch.where((hidden.abs() < TINY) | (value.abs() < TINY), value.abs(), 0.0)
    result = Exact("result", value, value.abs(), roundings, lost)
    if residual is None:
        return (result,)
    return result, Exact("residual", hidden, hidden.abs(), 2, torch.where(hidden.abs() < TINY, hidden.abs(), 0.0))
