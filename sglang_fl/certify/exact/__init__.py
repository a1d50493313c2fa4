# SPDX-License-Identifier: Apache-2.0
"""The operators in float64, a file a family, and how far from it an implementation may be (``judge.py``)."""

from .activation import silu_and_mul
from .gated_delta_rule import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gated_delta_rule_packed_decode,
)
from .judge import DTYPES, TINY, U32, Exact, Verdict, exactly, smallest, u
from .normalization import rms_norm
from .rotary import rotary_embedding

__all__ = [
    "DTYPES",
    "TINY",
    "U32",
    "Exact",
    "Verdict",
    "chunk_gated_delta_rule",
    "exactly",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_packed_decode",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "smallest",
    "u",
]
