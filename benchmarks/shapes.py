# SPDX-License-Identifier: Apache-2.0
"""Models by their shape alone: the published config.json, to be served with random weights.

``load_shape("qwen3-8b")`` is the whole model, ``load_shape("qwen3-8b:12")`` its first 12 layers: each layer
does the work it does in the whole model, and a cut model leaves room on a device for several engines.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_fl.config.errors import suggest

#: As published on the Hugging Face hub, but for ``tiny``, which is there to try things on a CPU, and qwen3.5-35b-a3b: its sizes are the
#: defaults of transformers' Qwen3_5MoeTextConfig, which are that model's; without the images' part. qwen3-next-80b-a3b and it are
#: hybrids (three layers of linear attention by the gated delta rule, then one of full attention); deepseek-v3 has latent attention, and
#: its matrices in fp8; gpt2-xl has NewGELU, and a short context: --input-len 512.
SHAPES: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(__file__).with_name("models").glob("*.json"))
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

    def _parameters(self) -> dict[str, int]:
        """How many numbers each weight has, by the name that transformers gives it."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**{name: value for name, value in self.config.items() if name != "quantization_config"})
        with torch.device("meta"):
            return {name: weight.numel() for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}

    def weight_count(self) -> int:
        return sum(self._parameters().values())

    def weight_bytes(self) -> int:
        """In bf16, or in fp8 but for the embeddings."""
        size = 1 if "quantization_config" in self.config else 2
        return sum(count * (2 if "embed" in name or "lm_head" in name else size) for name, count in self._parameters().items())

    def _full_attention_layers(self) -> int:
        """How many layers have keys and values; the others of a hybrid have a state."""
        return int(self.config["num_hidden_layers"]) // int(self.config.get("full_attention_interval", 1))

    def kv_numbers_per_token(self) -> int:
        """How many numbers the KV cache keeps for a token."""
        if "kv_lora_rank" in self.config:
            return int(self.config["num_hidden_layers"] * (self.config["kv_lora_rank"] + self.config["qk_rope_head_dim"]))
        head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]
        return int(2 * self._full_attention_layers() * self.config["num_key_value_heads"] * head_dim)

    def state_bytes(self) -> int:
        """How many bytes a sequence's states have, in fp32 as SGLang keeps them, and in bf16 what the convolutions look back on."""
        layers = self.config["num_hidden_layers"] - self._full_attention_layers()
        if not layers:
            return 0
        keys, values = (self.config[f"linear_num_{x}_heads"] * self.config[f"linear_{x}_head_dim"] for x in ("key", "value"))
        state, looked_back_on = values * self.config["linear_key_head_dim"], self.config["linear_conv_kernel_dim"] - 1
        return int(layers * (4 * state + 2 * (2 * keys + values) * looked_back_on))


def load_shape(text: str) -> Shape:
    """A built-in shape by name, ``NAME:LAYERS`` for one cut to that many layers, or a model's directory.

    Raises:
        UnknownShape: it is none of them, or cannot be cut so.
    """
    if (Path(text) / "config.json").is_file():
        return Shape(Path(text).resolve().name, json.loads((Path(text) / "config.json").read_text(encoding="utf-8")), Path(text))
    name, colon, layers = text.partition(":")
    if name not in SHAPES:
        raise UnknownShape(f"{text!r} is no directory with a config.json and no built-in shape{suggest(name, tuple(SHAPES))}")
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
