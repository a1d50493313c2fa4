# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: the kernels that SGLang itself serves with, behind the operators' signatures."""

from __future__ import annotations

import importlib.util
import sys
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .....device import Device, detect, probe
from ... import Backend

if TYPE_CHECKING:
    import torch

#: Vendors whose chips run CUDA kernels as NVIDIA's do.
_VENDORS = ("nvidia", "thead")


class CudaBackend(Backend):
    """sgl_kernel and SGLang's kernel library."""

    name = "cuda"

    @property
    def vendor(self) -> str:
        """The device's, where it is one of those that run these kernels, else NVIDIA."""
        found = self._device().vendor
        return found if found in _VENDORS else "nvidia"

    def _device(self) -> Device:
        return detect() if "torch" in sys.modules else probe()

    def is_available(self) -> bool:
        return self.why_unavailable() is None

    def why_unavailable(self) -> str | None:
        device = self._device()
        if device.vendor not in _VENDORS:
            return f"its kernels are for {' and '.join(_VENDORS)}, and this device is {device.vendor}"
        if importlib.util.find_spec("sgl_kernel") is None:
            return "sglang-kernel is not installed (uv pip install sglang-kernel)"
        return None

    @cached_property
    def _impl(self) -> Any:
        # Importing it loads the kernels, which only a process that runs a model should pay for.
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
        return self._impl.rotary_embedding(query, key, cos, sin, position_ids, rotary_interleaved, inplace)
