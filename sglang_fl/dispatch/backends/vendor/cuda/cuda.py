# SPDX-License-Identifier: Apache-2.0
"""CUDA: the kernels that SGLang itself serves with (sgl_kernel, its own library and FlashInfer's) behind the operators' signatures."""

import importlib.util
from functools import partial

from .....config import Settings
from .....device import Device
from ....types import BackendImplKind, why_left_to_triton
from ... import Kernel, KernelTable

#: Vendors whose chips run CUDA kernels as NVIDIA's do.
VENDORS = ("nvidia", "thead")
_16_BITS = ("bfloat16", "float16")


def _why_unavailable(settings: Settings, device: Device) -> str | None:
    if device.vendor not in VENDORS:
        return f"its kernels are for {' and '.join(VENDORS)}, and this device is {device.vendor}"
    if importlib.util.find_spec("sgl_kernel") is None:
        return "sglang-kernel is not installed (uv pip install sglang-kernel)"
    return None


def _why_left(op: str, settings: Settings, device: Device) -> str | None:
    """SGLang itself calls a Triton kernel here: the same one, or one that needs no copy. These run only if they have an order."""
    return _why_unavailable(settings, device) or why_left_to_triton(op, settings, device)


def _if_ordered(function: str, dtypes: tuple[str, ...] | None = None) -> Kernel:
    return Kernel(function, dtypes=dtypes, why_unavailable=partial(_why_left, function.partition(":")[2]))


BACKEND = KernelTable(
    __package__,
    "vendor.cuda",
    BackendImplKind.VENDOR,
    {
        "silu_and_mul": Kernel("impl.activation:silu_and_mul", writes_inputs=False),
        "gelu_and_mul": Kernel("impl.activation:gelu_and_mul", writes_inputs=False),
        "relu2": Kernel("impl.activation:relu2", writes_inputs=False),
        "rms_norm": Kernel("impl.normalization:rms_norm", dtypes=_16_BITS),
        "gemma_rms_norm": Kernel("impl.normalization:gemma_rms_norm", dtypes=_16_BITS),
        "layer_norm": Kernel("impl.normalization:layer_norm", writes_inputs=False, dtypes="bfloat16"),
        "rotary_embedding": Kernel("impl.rotary:rotary_embedding"),
        "mrotary_embedding": Kernel("impl.rotary:mrotary_embedding"),
        "topk": Kernel("impl.moe:topk", writes_inputs=False),
        "chunk_gated_delta_rule": Kernel("impl.gated_delta_rule:chunk_gated_delta_rule", dtypes=_16_BITS),
        "fused_recurrent_gated_delta_rule_packed_decode": Kernel("impl.gated_delta_rule:fused_recurrent_gated_delta_rule_packed_decode"),
        "fused_sigmoid_gating_delta_rule_update": _if_ordered("impl.gated_delta_rule:fused_sigmoid_gating_delta_rule_update"),
        "causal_conv1d_fn": _if_ordered("impl.causal_conv1d:causal_conv1d_fn", _16_BITS),
        "causal_conv1d_update": _if_ordered("impl.causal_conv1d:causal_conv1d_update", _16_BITS),
    },
    vendor="nvidia",
    why_unavailable=_why_unavailable,
)
