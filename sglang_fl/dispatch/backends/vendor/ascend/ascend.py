# SPDX-License-Identifier: Apache-2.0
"""Huawei Ascend: torch_npu's fused operators behind the operators' signatures. None of them writes its inputs."""

import importlib.util

from .....config import Settings
from .....device import Device
from ....types import BackendImplKind
from ... import Kernel, KernelTable

#: Module -> its functions, each under its operator's name.
_FUNCTIONS = {
    "impl.activation": ("silu_and_mul", "gelu_and_mul", "new_gelu", "quick_gelu"),
    "impl.normalization": ("rms_norm", "gemma_rms_norm", "layer_norm"),
    "impl.rotary": ("rotary_embedding", "mrotary_embedding"),
    "impl.moe": ("topk",),
}


def _why_unavailable(settings: Settings, device: Device) -> str | None:
    if device.vendor != "ascend":
        return f"its operators are for ascend, and this device is {device.vendor}"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed (pip install torch_npu, of the version that fits PyTorch's)"
    return None


BACKEND = KernelTable(
    __package__,
    "vendor.ascend",
    BackendImplKind.VENDOR,
    {op: Kernel(f"{module}:{op}", writes_inputs=False) for module, ops in _FUNCTIONS.items() for op in ops},
    vendor="ascend",
    why_unavailable=_why_unavailable,
)
