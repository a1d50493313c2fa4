# SPDX-License-Identifier: Apache-2.0
"""An EAGLE draft model for the demo model, trained on its text: it guesses most of the next tokens."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from sglang_fl.cli.demo_model import QUESTION, RECITAL, demo_model

_STEPS, _ENOUGH = 300, 0.95


def eagle_draft(directory: Path) -> Path:
    """It predicts the target's next hidden state from the last one and the token after it (Li et al. 2024, arXiv:2401.15077).

    Its embedding and head are the demo model's: SGLang shares them.

    Raises:
        RuntimeError: it did not learn to.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    target = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    said = target.config
    config = LlamaConfig(
        architectures=["LlamaForCausalLMEagle"],
        vocab_size=said.vocab_size,
        hidden_size=said.hidden_size,
        intermediate_size=said.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=said.num_attention_heads,
        num_key_value_heads=said.num_key_value_heads,
        head_dim=said.head_dim,
        max_position_embeddings=said.max_position_embeddings,
        rms_norm_eps=said.rms_norm_eps,
        tie_word_embeddings=False,
        dtype="bfloat16",
        attn_implementation="eager",
    )
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokens = tokenizer(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{RECITAL}<|im_end|>", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = target.model(input_ids=tokens).last_hidden_state
        before, wanted, embedded = hidden[:, :-2], hidden[:, 1:-1], target.model.embed_tokens(tokens[:, 1:-1])
    next_token, head = tokens[0, 2:], target.lm_head.weight.detach()
    positions = torch.arange(before.shape[1])[None]
    mask = torch.full((1, 1, before.shape[1], before.shape[1]), -torch.inf).triu(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layer = LlamaDecoderLayer(config, 0)
        layer.input_layernorm = nn.Identity()
        fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        angles = LlamaRotaryEmbedding(config)(embedded, positions)
        optimizer = torch.optim.AdamW([*layer.parameters(), *fc.parameters()], lr=3e-3, weight_decay=0.0)
        for _ in range(_STEPS):
            noisy = before + 0.2 * (torch.rand_like(before) - 0.5)  # later it is given its own predictions
            out = layer(fc(torch.cat((embedded, noisy), -1)), attention_mask=mask, position_embeddings=angles)
            logits = (out @ head.T)[0]
            loss = functional.cross_entropy(logits, next_token) + functional.smooth_l1_loss(out, wanted)
            right = float((logits.argmax(-1) == next_token).float().mean())
            if right > _ENOUGH:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            raise RuntimeError(f"the draft guesses {right:.0%} of the tokens after {_STEPS} steps")
    directory.mkdir()
    weights = {"fc.weight": fc.weight, **{f"layers.0.{name}": weight for name, weight in layer.named_parameters()}}
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return directory
