# SPDX-License-Identifier: Apache-2.0
import torch

from ..library import load

gems_silu_and_mul = load().modules.activation.gems_silu_and_mul


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    if x.shape[-1] % 2:
        raise ValueError(f"silu_and_mul: the last dimension holds two halves; it cannot be {x.shape[-1]}")
    gate, up = x.chunk(2, dim=-1)
    return gems_silu_and_mul(gate, up)
