# SPDX-License-Identifier: Apache-2.0
from functools import lru_cache
from typing import Any

import torch

from ..library import load

gems_rms_forward = load().modules.normalization.gems_rms_forward

Normed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@lru_cache
def _one(device: torch.device) -> torch.Tensor:
    """``[1]`` in fp32. A layer's trial makes it, before any graph is captured."""
    return torch.ones(1, dtype=torch.float32, device=device)


def gemma_rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    """FlagGems's norm by ``1 + weight`` in fp32, into which adding a tensor of fp32 turns a weight of any dtype."""
    return gems_rms_forward(x, residual, obj.weight + _one(obj.weight.device), obj.variance_epsilon)


def rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    """In place where there is a residual."""
    return gems_rms_forward(x, residual, obj.weight, obj.variance_epsilon)
