# SPDX-License-Identifier: Apache-2.0
"""Huawei Ascend: torch_npu's fused operators behind the operators' signatures. None of them writes its inputs."""

import importlib.util

from .....config import Settings
from .....device import Device
from ....types import BackendImplKind
from ... import Kernel, KernelTable

_FUNCTIONS = {
    "silu_and_mul": "impl.activation:silu_and_mul",
    "gelu_and_mul": "impl.activation:gelu_and_mul",
    "new_gelu": "impl.activation:new_gelu",
    "quick_gelu": "impl.activation:quick_gelu",
    "rms_norm": "impl.normalization:rms_norm",
    "gemma_rms_norm": "impl.normalization:gemma_rms_norm",
    "layer_norm": "impl.normalization:layer_norm",
    "rotary_embedding": "impl.rotary:rotary_embedding",
    "mrotary_embedding": "impl.rotary:mrotary_embedding",
    "topk": "impl.moe:topk",
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
    {op: Kernel(function, writes_inputs=False) for op, function in _FUNCTIONS.items()},
    vendor="ascend",
    why_unavailable=_why_unavailable,
)
