# SPDX-License-Identifier: Apache-2.0
from functools import lru_cache
from typing import Any

import torch

from ....types import Refusal
from ...checks import MOST_OFFSET
from ..library import load

gems_rms_forward = load().modules.normalization.gems_rms_forward

Normed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@lru_cache
def _one(device: torch.device) -> torch.Tensor:
    """``[1]`` in fp32. A layer's trial makes it, before any graph is captured."""
    return torch.ones(1, dtype=torch.float32, device=device)


def _normed(op: str, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Normed:
    """In place where there is a residual."""
    if x.numel() > MOST_OFFSET:
        raise Refusal(f"{op}: FlagGems's kernel counts in int32, and x has {x.numel()} numbers")
    normed: Normed = gems_rms_forward(x, residual, weight, eps)
    return normed


def gemma_rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    """FlagGems's norm by ``1 + weight`` in fp32, into which adding a tensor of fp32 turns a weight of any dtype."""
    return _normed("gemma_rms_norm", x, residual, obj.weight + _one(obj.weight.device), obj.variance_epsilon)


def rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    return _normed("rms_norm", x, residual, obj.weight, obj.variance_epsilon)
