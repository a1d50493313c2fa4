# SPDX-License-Identifier: Apache-2.0
"""Activations in fp32, rounded once, at the end."""

import math
from typing import Any

import torch
from torch.nn import functional

from ...checks import half_of


def _halves(op: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate, in fp32, and what it is multiplied with."""
    gate, up = x.split(half_of(op, x), dim=-1)
    return gate.float(), up


def _gelu(x: torch.Tensor) -> torch.Tensor:
    # 1 + erf(v) is erfc(-v), without the cancellation. PyTorch's own gelu of infinity is nan on some CPUs.
    return x * (0.5 * torch.erfc(-math.sqrt(0.5) * x))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


_GELU = {"none": _gelu, "tanh": _gelu_tanh}


def gelu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = _halves("gelu_and_mul", x)
    return (_GELU[obj.approximate](gate) * up).to(x.dtype)


def new_gelu(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return _gelu_tanh(x.float()).to(x.dtype)


def quick_gelu(obj: Any, x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def relu2(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return x.float().relu().square().to(x.dtype)


def silu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = _halves("silu_and_mul", x)
    return (functional.silu(gate) * up).to(x.dtype)
