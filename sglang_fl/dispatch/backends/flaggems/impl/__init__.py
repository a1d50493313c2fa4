# SPDX-License-Identifier: Apache-2.0
"""Calls of FlagGems, a file a family of operators. Importing it imports FlagGems."""

from .activation import silu_and_mul
from .moe import fused_moe, topk
from .normalization import rms_norm
from .rotary import mrotary_embedding, rotary_embedding

__all__ = ["fused_moe", "mrotary_embedding", "rms_norm", "rotary_embedding", "silu_and_mul", "topk"]
