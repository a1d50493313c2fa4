# SPDX-License-Identifier: Apache-2.0
"""What a device's PyTorch captures graphs with."""

from collections.abc import Callable
from typing import Any

import torch


def graphs_of(device: torch.device) -> tuple[Callable[[], Any], Callable[..., Any]] | None:
    """What makes a graph on the device and what captures into it: ``torch.cuda.CUDAGraph``, ``torch.npu.NPUGraph``, …"""
    module = getattr(torch, device.type, None)
    for name in ("CUDAGraph", f"{device.type.upper()}Graph"):
        if hasattr(module, name) and hasattr(module, "graph"):
            return getattr(module, name), module.graph  # type: ignore[union-attr]
    return None
