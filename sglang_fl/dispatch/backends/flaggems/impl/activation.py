# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ..library import load

gems_gelu, gems_gelu_and_mul = load().gelu, load().gelu_and_mul
gems_silu_and_mul = load().modules.activation.gems_silu_and_mul


def _halves(op: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if x.shape[-1] % 2:
        raise ValueError(f"{op}: the last dimension holds two halves; it cannot be {x.shape[-1]}")
    return x.chunk(2, dim=-1)


def gelu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = _halves("gelu_and_mul", x)
    return gems_gelu_and_mul(gate, up, obj.approximate)


def new_gelu(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return gems_gelu(x, approximate="tanh")


def silu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = _halves("silu_and_mul", x)
    return gems_silu_and_mul(gate, up)
