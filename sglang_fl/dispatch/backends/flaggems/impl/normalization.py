# SPDX-License-Identifier: Apache-2.0
"""FlagGems's own signature is ours: ``(x, residual, weight, eps)``, in place where there is a residual."""

from functools import lru_cache

import torch

from ..library import load

rms_norm = load().modules.normalization.gems_rms_forward


@lru_cache
def _one(device: torch.device) -> torch.Tensor:
    """``[1]`` in fp32. A layer's trial makes it, before any graph is captured."""
    return torch.ones(1, dtype=torch.float32, device=device)


def gemma_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """FlagGems's norm by ``1 + weight`` in fp32, into which adding a tensor of fp32 turns a weight of any dtype."""
    return rms_norm(x, residual, weight + _one(weight.device), eps)
