# SPDX-License-Identifier: Apache-2.0
"""Models by their shape alone: the published config.json, to be served with random weights.

``load_shape("qwen3-8b")`` is the whole model, ``load_shape("qwen3-8b:12")`` its first 12 layers: each layer
does the work it does in the whole model, and a cut model leaves room on a device for several engines.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

#: As published on the Hugging Face hub, but for ``tiny``, which is there to try things on a CPU.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_QWEN3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "max_position_embeddings": 4096,
        "max_window_layers": 3,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "vocab_size": 2048,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        **_QWEN3,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
    # A hybrid: three layers of linear attention by the gated delta rule, then one of full attention.
    "qwen3-next-80b-a3b": {
        **_QWEN3,
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "decoder_sparse_step": 1,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
    },
    # Latent attention, matrices in fp8 by blocks, experts from the fourth layer on.
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    # Its activation is NewGELU, and its context short: --input-len 512.
    "gpt2-xl": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "hidden_size": 1600,
        "initializer_range": 0.02,
        "intermediate_size": 6400,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 1024,
        "num_attention_heads": 25,
        "num_hidden_layers": 48,
        "num_key_value_heads": 25,
        "resid_pdrop": 0.1,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 50257,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    },
}


class UnknownShape(ValueError):
    """Neither a model's directory nor a built-in shape. The message names the nearest one."""


@dataclass(frozen=True)
class Shape:
    """A model's config.json, and its directory if it has weights."""

    name: str
    config: dict[str, Any]
    directory: Path | None = None

    def write(self, directory: Path) -> Path:
        """The directory to serve: the model's own, or this one, with the config.json written to it."""
        if self.directory is not None:
            return self.directory
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        return directory

    def _head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    def _full_attention_layers(self) -> int:
        """How many layers have keys and values; the others of a hybrid have a state."""
        return int(self.config["num_hidden_layers"]) // int(self.config.get("full_attention_interval", 1))

    def _linear_attention_layers(self) -> int:
        return int(self.config["num_hidden_layers"]) - self._full_attention_layers()

    def _linear_sizes(self) -> tuple[int, int]:
        """The numbers of a token's keys and of its values in a layer of linear attention."""
        keys, values = (self.config[f"linear_num_{x}_heads"] * self.config[f"linear_{x}_head_dim"] for x in ("key", "value"))
        return int(keys), int(values)

    def _embedding_count(self) -> int:
        return int(self.config["vocab_size"] * self.config["hidden_size"] * (1 if self.config.get("tie_word_embeddings") else 2))

    def _attention_count(self) -> int:
        """How many numbers the weights of attention have in all layers, linear attention included."""
        config = self.config
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        if (latent := config.get("kv_lora_rank")) is not None:
            nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
            queries = config["q_lora_rank"] * (hidden + heads * (nope + rope))
            keys_and_values = hidden * (latent + rope) + latent * heads * (nope + value)
            return int(config["num_hidden_layers"] * (queries + keys_and_values + heads * value * hidden))
        # A hybrid's queries come with a gate.
        queries = heads * (3 if "full_attention_interval" in config else 2)
        count = self._full_attention_layers() * self._head_dim() * (queries + 2 * config["num_key_value_heads"])
        if self._linear_attention_layers():
            keys, values = self._linear_sizes()
            count += self._linear_attention_layers() * (2 * keys + 3 * values + 2 * config["linear_num_value_heads"])
        return int(hidden * count)

    def weight_count(self) -> int:
        """How many numbers the weights have, but for the norms', biases and convolutions, which are few."""
        config = self.config
        matrices = 2 if "activation_function" in config else 3  # GPT-2's are not gated
        dense = matrices * config["intermediate_size"]
        experts = config.get("num_experts") or config.get("n_routed_experts")
        layers = config["num_hidden_layers"]
        dense_layers = min(layers, config.get("first_k_dense_replace", 0)) if experts else layers
        shared = config.get("shared_expert_intermediate_size")
        width = config.get("moe_intermediate_size", 0)
        sparse = (experts or 0) * (3 * width + 1) + 3 * width * config.get("n_shared_experts", 0) + (3 * shared + 1 if shared else 0)
        mlps = dense_layers * dense + (layers - dense_layers) * sparse
        return int(self._embedding_count() + self._attention_count() + config["hidden_size"] * mlps)

    def weight_bytes(self) -> int:
        """In bf16, or in fp8 but for the embeddings."""
        embeddings = self._embedding_count()
        return 2 * embeddings + (self.weight_count() - embeddings) * (1 if "quantization_config" in self.config else 2)

    def kv_numbers_per_token(self) -> int:
        """How many numbers the KV cache keeps for a token."""
        if "kv_lora_rank" in self.config:
            return int(self.config["num_hidden_layers"] * (self.config["kv_lora_rank"] + self.config["qk_rope_head_dim"]))
        return int(2 * self._full_attention_layers() * self.config["num_key_value_heads"] * self._head_dim())

    def state_bytes(self) -> int:
        """How many bytes a sequence's states have, in fp32 as SGLang keeps them, and in bf16 what the convolutions look back on."""
        layers = self._linear_attention_layers()
        if not layers:
            return 0
        keys, values = self._linear_sizes()
        return int(
            layers
            * (4 * values * self.config["linear_key_head_dim"] + 2 * (2 * keys + values) * (self.config["linear_conv_kernel_dim"] - 1))
        )


def load_shape(text: str) -> Shape:
    """A built-in shape by name, ``NAME:LAYERS`` for one cut to that many layers, or a model's directory.

    Raises:
        UnknownShape: it is none of them, or cannot be cut so.
    """
    if (Path(text) / "config.json").is_file():
        return Shape(Path(text).resolve().name, json.loads((Path(text) / "config.json").read_text(encoding="utf-8")), Path(text))
    name, colon, layers = text.partition(":")
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=1, cutoff=0.4)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownShape(f"{text!r} is no directory with a config.json and no built-in shape ({', '.join(SHAPES)}){meant}")
    config = dict(SHAPES[name])
    if colon:
        whole = config["num_hidden_layers"]
        if not layers.isdecimal() or not 0 < int(layers) <= whole:
            raise UnknownShape(f"{text!r}: {layers!r} is no number of layers from 1 to {whole}, which {name} has")
        interval = config.get("full_attention_interval", 1)
        if int(layers) < interval:
            raise UnknownShape(f"{text!r}: {name} has full attention in each {interval}th layer, so that it has at least {interval}")
        config |= {name: int(layers) for name in ("num_hidden_layers", "max_window_layers") if name in config}
    return Shape(text, config)
