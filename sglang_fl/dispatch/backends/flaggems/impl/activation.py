# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from ...checks import half_of
from ..library import load

gems_gelu, gems_gelu_and_mul = load().gelu, load().gelu_and_mul
gems_silu_and_mul = load().modules.activation.gems_silu_and_mul


def gelu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.split(half_of("gelu_and_mul", x), dim=-1)
    return gems_gelu_and_mul(gate, up, obj.approximate)


def new_gelu(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return gems_gelu(x, approximate="tanh")


def silu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = x.split(half_of("silu_and_mul", x), dim=-1)
    return gems_silu_and_mul(gate, up)
