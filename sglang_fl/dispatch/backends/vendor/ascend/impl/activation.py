# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
import torch_npu

from ....checks import half_of


def gelu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    size = half_of("gelu_and_mul", x)
    if not x.numel():
        return x.new_empty((*x.shape[:-1], size))
    # Of a gate in the first half, and with the gate's GELU as a second result.
    return torch_npu.npu_geglu(x, dim=-1, approximate=1 if obj.approximate == "tanh" else 0, activate_left=True)[0]


def new_gelu(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return torch_npu.npu_gelu(x, approximate="tanh") if x.numel() else torch.empty_like(x)


def quick_gelu(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return torch_npu.npu_fast_gelu(x) if x.numel() else torch.empty_like(x)


def silu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    size = half_of("silu_and_mul", x)
    return torch_npu.npu_swiglu(x) if x.numel() else x.new_empty((*x.shape[:-1], size))
