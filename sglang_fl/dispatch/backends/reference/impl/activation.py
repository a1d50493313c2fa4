# SPDX-License-Identifier: Apache-2.0
import torch
from torch.nn import functional


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """SiLU of the gate, times the other half; one rounding, at the end."""
    if x.shape[-1] % 2:
        raise ValueError(f"silu_and_mul: the last dimension holds two halves; it cannot be {x.shape[-1]}")
    gate, up = x.chunk(2, dim=-1)
    return (functional.silu(gate.float()) * up).to(x.dtype)
