# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch


def rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A pattern in plain PyTorch: put your kernel here. ``sglang_fl.dispatch.ops.FLBackendBase.rms_norm`` says what it must compute.

    Args:
        obj: the layer: ``obj.weight`` ``[hidden_size]``, possibly of another dtype than x, and ``obj.variance_epsilon``, which is
            added to the mean of the squares.
        x: ``[..., hidden_size]``, fp32, bf16 or fp16; any dimension but the last may be 0, and it need not be contiguous.
            It may be written only if there is a residual.
        residual: of the shape and dtype of x, or None; may be written.

    Returns:
        The normed x; with a residual also the sum of x and residual, each rounded once, to x's dtype.
    """
    # What a kernel does not take it refuses, before it writes anything: the call then goes to the next in order.
    if x.shape[-1] != obj.weight.shape[-1]:
        raise ValueError(f"rms_norm: hidden_size is {obj.weight.shape[-1]}, but the last dimension of x is {x.shape[-1]}")
    hidden = x.float() if residual is None else x.float() + residual.float()
    scale = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + obj.variance_epsilon)
    normed = (hidden * scale * obj.weight.float()).to(x.dtype)
    return normed if residual is None else (normed, hidden.to(x.dtype))
