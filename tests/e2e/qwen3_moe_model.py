# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen3-MoE that recites: each token goes to two of eight experts in each layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sglang_fl.cli.demo_model import reciting_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def qwen3_moe(end: int) -> PreTrainedModel:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # the least that SGLang's Qwen3-MoE can rotate on CUDA
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def qwen3_moe_model() -> Path:
    """The model's directory; trains it if it is not there yet."""
    return reciting_model("qwen3-moe", qwen3_moe)
