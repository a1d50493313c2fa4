# SPDX-License-Identifier: Apache-2.0
"""The Ascend backend: torch_npu's fused operators behind the operators' signatures."""

import importlib.util
import sys

from .....device import detect, probe
from ... import KernelBackend


class AscendBackend(KernelBackend):
    """torch_npu's npu_swiglu, npu_geglu, npu_rms_norm, npu_mrope and others. None of them writes its inputs."""

    name = "ascend"
    vendor = "ascend"

    def why_unavailable(self) -> str | None:
        device = detect() if "torch" in sys.modules else probe()
        if device.vendor != "ascend":
            return f"its operators are for ascend, and this device is {device.vendor}"
        if importlib.util.find_spec("torch_npu") is None:
            return "torch_npu is not installed (pip install torch_npu, of the version that fits PyTorch's)"
        return None
