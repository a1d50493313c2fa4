# SPDX-License-Identifier: Apache-2.0
"""The reference's arithmetic by tensors instead of layers, as kernels take them: what stand-ins of kernels compute with."""

from types import SimpleNamespace
from typing import Any

import torch
from backend_functions import reference


def gelu_and_mul(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return reference.gelu_and_mul(SimpleNamespace(approximate=approximate), x)


def new_gelu(x: torch.Tensor) -> torch.Tensor:
    return reference.new_gelu(None, x)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return reference.quick_gelu(None, x)


def relu2(x: torch.Tensor) -> torch.Tensor:
    return reference.relu2(None, x)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return reference.silu_and_mul(None, x)


def rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Any:
    return reference.rms_norm(SimpleNamespace(weight=weight, variance_epsilon=eps), x, residual)


def gemma_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> Any:
    return reference.gemma_rms_norm(SimpleNamespace(weight=weight, variance_epsilon=eps), x, residual)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return reference.layer_norm(SimpleNamespace(weight=weight, bias=bias, variance_epsilon=eps), x)


def rotary_embedding(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.rotary_embedding(None, *args)
