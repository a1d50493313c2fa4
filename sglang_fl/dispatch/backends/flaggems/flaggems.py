# SPDX-License-Identifier: Apache-2.0
"""FlagGems: its Triton kernels behind the operators' signatures, on every chip that it serves."""

from ....config import Settings
from ....device import Device
from ...types import BackendImplKind
from .. import Kernel, KernelTable
from .library import why_not_here

_16_BITS = ("bfloat16", "float16")


def _why_unavailable(settings: Settings, device: Device) -> str | None:
    return why_not_here(device)


BACKEND = KernelTable(
    __package__,
    "default.flagos",
    BackendImplKind.DEFAULT,
    {
        "silu_and_mul": Kernel("impl.activation:silu_and_mul", writes_inputs=False),
        "gelu_and_mul": Kernel("impl.activation:gelu_and_mul", writes_inputs=False),
        "new_gelu": Kernel("impl.activation:new_gelu", writes_inputs=False),
        "rms_norm": Kernel("impl.normalization:rms_norm"),
        "gemma_rms_norm": Kernel("impl.normalization:gemma_rms_norm"),
        "rotary_embedding": Kernel("impl.rotary:rotary_embedding"),
        "mrotary_embedding": Kernel("impl.rotary:mrotary_embedding"),
        "topk": Kernel("impl.moe:topk", writes_inputs=False),
        "fused_moe": Kernel("impl.moe:fused_moe", writes_inputs=False, dtypes=_16_BITS),
        "chunk_gated_delta_rule": Kernel("impl.gated_delta_rule:chunk_gated_delta_rule", dtypes=_16_BITS),
        "fused_recurrent_gated_delta_rule_packed_decode": Kernel("impl.gated_delta_rule:fused_recurrent_gated_delta_rule_packed_decode"),
    },
    why_unavailable=_why_unavailable,
)
