# SPDX-License-Identifier: Apache-2.0
"""Calls of CUDA kernels, a file a family of operators. Importing it loads them."""

from .activation import gelu_and_mul, relu2, silu_and_mul
from .gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule, fused_recurrent_gated_delta_rule_packed_decode
from .moe import topk
from .normalization import gemma_rms_norm, layer_norm, rms_norm
from .rotary import mrotary_embedding, rotary_embedding

__all__ = [
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_packed_decode",
    "gelu_and_mul",
    "gemma_rms_norm",
    "layer_norm",
    "mrotary_embedding",
    "relu2",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "topk",
]
