# SPDX-License-Identifier: Apache-2.0
"""Calls of torch_npu, a file a family of operators. Importing it imports torch_npu."""

from .activation import silu_and_mul
from .moe import topk
from .normalization import rms_norm
from .rotary import mrotary_embedding, rotary_embedding

__all__ = ["mrotary_embedding", "rms_norm", "rotary_embedding", "silu_and_mul", "topk"]
