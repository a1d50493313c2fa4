# SPDX-License-Identifier: Apache-2.0
"""The operators in float64, a file a family, and how far from it an implementation may be (``judge.py``)."""

from .activation import silu_and_mul
from .judge import DTYPES, TINY, U32, Exact, Verdict, exactly, smallest, u
from .moe import Routed, fused_moe, topk
from .normalization import rms_norm
from .rotary import rotary_embedding

__all__ = [
    "DTYPES",
    "TINY",
    "U32",
    "Exact",
    "Routed",
    "Verdict",
    "exactly",
    "fused_moe",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "smallest",
    "topk",
    "u",
]
