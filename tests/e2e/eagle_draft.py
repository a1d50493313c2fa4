# SPDX-License-Identifier: Apache-2.0
"""An EAGLE draft model for the demo model: right in form, with random weights, so that most of what it drafts is refused."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 128, 256, 4, 2, 64
SHAPES = {
    "fc": (HIDDEN, 2 * HIDDEN),
    "layers.0.self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "layers.0.self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "layers.0.self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "layers.0.self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "layers.0.mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "layers.0.mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "layers.0.mlp.down_proj": (HIDDEN, INTERMEDIATE),
    "layers.0.post_attention_layernorm": (HIDDEN,),
}


def eagle_draft(directory: Path) -> Path:
    """Its embedding and head are the demo model's: SGLang shares them."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(7)
    weights = {
        f"{name}.weight": (1.0 if len(shape) == 1 else 0.0) + 0.02 * torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
    }
    save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, directory / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLMEagle"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory
