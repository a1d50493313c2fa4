# SPDX-License-Identifier: Apache-2.0
"""This package's Triton kernels, for operators in which FlagGems's cost more than SGLang's own."""

import importlib.util

from ....config import Settings
from ....device import Device, known_vendors
from ...types import BackendImplKind
from .. import Kernel, KernelTable


def _why_unavailable(settings: Settings, device: Device) -> str | None:
    if not known_vendors()[device.vendor].flaggems:  # whose kernels are Triton's as well
        return f"no Triton compiler is known for {device.vendor}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


BACKEND = KernelTable(
    __package__,
    "triton.sglang_fl",
    BackendImplKind.TRITON,
    {
        "silu_and_mul": Kernel("impl.activation:silu_and_mul", writes_inputs=False, batch_invariant=True),
        "gelu_and_mul": Kernel("impl.activation:gelu_and_mul", writes_inputs=False, batch_invariant=True),
        "rms_norm": Kernel("impl.normalization:rms_norm", batch_invariant=True),
        "gemma_rms_norm": Kernel("impl.normalization:gemma_rms_norm", batch_invariant=True),
        "rotary_embedding": Kernel("impl.rotary:rotary_embedding", batch_invariant=True),
        "mrotary_embedding": Kernel("impl.rotary:mrotary_embedding", batch_invariant=True),
        "fused_moe": Kernel("impl.moe:fused_moe", writes_inputs=False, dtypes=("bfloat16", "float16")),
        "fused_recurrent_gated_delta_rule_packed_decode": Kernel(
            "impl.gated_delta_rule:fused_recurrent_gated_delta_rule_packed_decode", batch_invariant=True
        ),
    },
    why_unavailable=_why_unavailable,
)
