# SPDX-License-Identifier: Apache-2.0
import torch


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm in fp32, rounded once; the sum with the residual is normalised before it is rounded."""
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"rms_norm: hidden_size is {weight.shape[-1]}, the last dimension of x {x.shape[-1]}")
    hidden = x.float()
    if residual is not None:
        hidden = hidden + residual
    scale = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + eps)
    normed = (hidden * scale * weight.float()).to(x.dtype)
    return normed if residual is None else (normed, hidden.to(x.dtype))
