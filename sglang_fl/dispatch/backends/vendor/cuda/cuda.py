# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: the kernels that SGLang itself serves with, behind the operators' signatures."""

import importlib.util
import sys

from .....device import Device, detect, probe
from ... import KernelBackend

#: Vendors whose chips run CUDA kernels as NVIDIA's do.
_VENDORS = ("nvidia", "thead")


class CudaBackend(KernelBackend):
    """sgl_kernel, SGLang's kernel library and FlashInfer's."""

    name = "cuda"

    @property
    def vendor(self) -> str:
        """The device's, where it is one of those that run these kernels, else NVIDIA."""
        found = self._device().vendor
        return found if found in _VENDORS else "nvidia"

    def _device(self) -> Device:
        return detect() if "torch" in sys.modules else probe()

    def why_unavailable(self) -> str | None:
        device = self._device()
        if device.vendor not in _VENDORS:
            return f"its kernels are for {' and '.join(_VENDORS)}, and this device is {device.vendor}"
        if importlib.util.find_spec("sgl_kernel") is None:
            return "sglang-kernel is not installed (uv pip install sglang-kernel)"
        return None
