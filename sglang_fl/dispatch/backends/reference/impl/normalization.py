# SPDX-License-Identifier: Apache-2.0
"""Norms in fp32, rounded once, at the end."""

import torch


def _check_size(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"{op}: hidden_size is {weight.shape[-1]}, the last dimension of x {x.shape[-1]}")


def _normalized(
    x: torch.Tensor, residual: torch.Tensor | None, scale: torch.Tensor, eps: float
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The sum with the residual is normalised before it is rounded; ``scale`` is fp32."""
    hidden = x.float()
    if residual is not None:
        hidden = hidden + residual
    rstd = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + eps)
    normed = (hidden * rstd * scale).to(x.dtype)
    return normed if residual is None else (normed, hidden.to(x.dtype))


def gemma_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    _check_size("gemma_rms_norm", x, weight)
    return _normalized(x, residual, 1 + weight.float(), eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    _check_size("layer_norm", x, weight)
    hidden = x.float()
    centred = hidden - hidden.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (centred * rstd * weight.float() + bias.float()).to(x.dtype)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    _check_size("rms_norm", x, weight)
    return _normalized(x, residual, weight.float(), eps)
