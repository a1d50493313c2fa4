# SPDX-License-Identifier: Apache-2.0
"""Calls of torch_npu, a file a family of operators. Importing it imports torch_npu."""

from .activation import gelu_and_mul, new_gelu, quick_gelu, silu_and_mul
from .moe import topk
from .normalization import gemma_rms_norm, layer_norm, rms_norm
from .rotary import mrotary_embedding, rotary_embedding

__all__ = [
    "gelu_and_mul",
    "gemma_rms_norm",
    "layer_norm",
    "mrotary_embedding",
    "new_gelu",
    "quick_gelu",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "topk",
]
