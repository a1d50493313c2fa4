# SPDX-License-Identifier: Apache-2.0
"""The Ascend backend: torch_npu's fused operators behind the operators' signatures."""

from __future__ import annotations

import importlib.util
import sys
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .....device import detect, probe
from ... import Backend

if TYPE_CHECKING:
    import torch


class AscendBackend(Backend):
    """npu_swiglu, npu_rms_norm, npu_add_rms_norm, npu_mrope and npu_rotary_mul. None of them writes its inputs."""

    name = "ascend"
    vendor = "ascend"

    def is_available(self) -> bool:
        return self.why_unavailable() is None

    def why_unavailable(self) -> str | None:
        device = detect() if "torch" in sys.modules else probe()
        if device.vendor != "ascend":
            return f"its operators are for ascend, and this device is {device.vendor}"
        if importlib.util.find_spec("torch_npu") is None:
            return "torch_npu is not installed (pip install torch_npu, of the version that fits PyTorch's)"
        return None

    @cached_property
    def _impl(self) -> Any:
        # Importing it imports torch_npu, which only a process that runs a model should pay for.
        return import_module(f"{__package__}.impl")

    def silu_and_mul(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        return self._impl.silu_and_mul(x)

    def rms_norm(self, obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self._impl.rms_norm(x, residual, obj.weight, obj.variance_epsilon)

    def rotary_embedding(
        self,
        obj: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor,
        rotary_interleaved: bool = False,
        inplace: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._impl.rotary_embedding(query, key, cos, sin, position_ids, rotary_interleaved)
