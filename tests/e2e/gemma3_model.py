# SPDX-License-Identifier: Apache-2.0
"""A tiny Gemma 3 that recites: two layers that see a window of 32 tokens, and one that sees them all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sglang_fl.cli.demo_model import reciting_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gemma3(end: int) -> PreTrainedModel:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        # GELU is given numbers of the size that real models give it.
        initializer_range=0.1,
        sliding_window=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        bos_token_id=1,
        eos_token_id=end,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config)


def gemma3_model() -> Path:
    """The model's directory; it is trained at the first call."""
    return reciting_model("gemma3", gemma3)
