# SPDX-License-Identifier: Apache-2.0
"""Calls of CUDA kernels, a file a family of operators. Importing it loads them."""

from .activation import silu_and_mul
from .gated_delta_rule import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gated_delta_rule_packed_decode,
)
from .normalization import rms_norm
from .rotary import rotary_embedding

__all__ = [
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_packed_decode",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
]
