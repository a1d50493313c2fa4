# SPDX-License-Identifier: Apache-2.0
"""Norms in fp32, rounded once, at the end."""

from typing import Any

import torch

from ...checks import check_hidden_size

Normed = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def _normalized(x: torch.Tensor, residual: torch.Tensor | None, scale: torch.Tensor, eps: float) -> Normed:
    """The sum with the residual is normalised before it is rounded; ``scale`` is fp32."""
    hidden = x.float()
    if residual is not None:
        hidden = hidden + residual
    rstd = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + eps)
    normed = (hidden * rstd * scale).to(x.dtype)
    return normed if residual is None else (normed, hidden.to(x.dtype))


def gemma_rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    check_hidden_size("gemma_rms_norm", x, obj.weight)
    return _normalized(x, residual, 1 + obj.weight.float(), obj.variance_epsilon)


def layer_norm(obj: Any, x: torch.Tensor) -> torch.Tensor:
    check_hidden_size("layer_norm", x, obj.weight)
    hidden = x.float()
    centred = hidden - hidden.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + obj.variance_epsilon)
    return (centred * rstd * obj.weight.float() + obj.bias.float()).to(x.dtype)


def rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Normed:
    check_hidden_size("rms_norm", x, obj.weight)
    return _normalized(x, residual, obj.weight.float(), obj.variance_epsilon)
