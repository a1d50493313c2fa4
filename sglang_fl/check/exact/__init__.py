# SPDX-License-Identifier: Apache-2.0
"""The operators in float64, a file a family, and how far from it an implementation may be (``judge.py``)."""

from .activation import gelu_and_mul, new_gelu, quick_gelu, relu2, silu_and_mul
from .gated_delta_rule import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gated_delta_rule_packed_decode,
)
from .judge import DTYPES, TINY, U32, Exact, Verdict, exactly, smallest, u
from .moe import Experts, Routed, Routing, fused_moe, topk
from .normalization import gemma_rms_norm, layer_norm, rms_norm
from .rotary import mrotary_embedding, rotary_embedding

__all__ = [
    "DTYPES",
    "TINY",
    "U32",
    "Exact",
    "Experts",
    "Routed",
    "Routing",
    "Verdict",
    "chunk_gated_delta_rule",
    "exactly",
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
    "smallest",
    "topk",
    "u",
]
