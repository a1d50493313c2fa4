# SPDX-License-Identifier: Apache-2.0
"""The reference's arithmetic, a file a family of operators. Importing it imports PyTorch.

The gated delta rule's is imported when it is asked for: it is kept from torch.compile, and PyTorch imports its compiler for
that, which takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .activation import gelu_and_mul, new_gelu, quick_gelu, relu2, silu_and_mul
from .moe import fused_moe, topk
from .normalization import gemma_rms_norm, layer_norm, rms_norm
from .rotary import mrotary_embedding, rotary_embedding

if TYPE_CHECKING:
    from .gated_delta_rule import (
        chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule,
        fused_recurrent_gated_delta_rule_packed_decode,
    )

__all__ = [
    "chunk_gated_delta_rule",
    "fused_moe",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_packed_decode",
    "gelu_and_mul",
    "gemma_rms_norm",
    "layer_norm",
    "mrotary_embedding",
    "new_gelu",
    "quick_gelu",
    "relu2",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "topk",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(".gated_delta_rule", __name__), name)
    return found
