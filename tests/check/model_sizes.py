# SPDX-License-Identifier: Apache-2.0
"""Makes ``sglang_fl/check/cases/models.json``: the sizes that the configuration classes of models have by default.

``python tests/check/model_sizes.py`` prints it. Classes are those of the installed transformers and SGLang.
"""

import json
import math
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "sglang_fl" / "check" / "cases" / "models.json"
#: Family -> its configuration classes: in transformers' ``models``, or in SGLang's ``srt.configs`` where a slash comes first.
FAMILIES = {
    "Llama": "llama.LlamaConfig llama4.Llama4TextConfig",
    "Qwen": "qwen2.Qwen2Config qwen2_moe.Qwen2MoeConfig qwen2_5_vl.Qwen2_5_VLTextConfig qwen3.Qwen3Config qwen3_moe.Qwen3MoeConfig "
    "qwen3_vl.Qwen3VLTextConfig qwen3_next.Qwen3NextConfig qwen3_5.Qwen3_5TextConfig qwen3_5_moe.Qwen3_5MoeTextConfig "
    "/qwen3_next.Qwen3NextConfig",
    "Gemma": "gemma.GemmaConfig gemma2.Gemma2Config gemma3.Gemma3TextConfig gemma3n.Gemma3nTextConfig gemma4.Gemma4TextConfig",
    "DeepSeek": "deepseek_v2.DeepseekV2Config deepseek_v3.DeepseekV3Config deepseek_v32.DeepseekV32Config /deepseek_v4.DeepSeekV4Config",
    "GLM": "glm.GlmConfig glm4.Glm4Config glm4v.Glm4vTextConfig glm4_moe.Glm4MoeConfig /glm5_next.Glm5NextTextConfig",
    "Kimi": "kimi_linear.KimiLinearConfig /kimi_linear.KimiLinearConfig /kimi_k25.KimiK25Config /kimi_k3.KimiK3Config",
    "MiniMax": "minimax.MiniMaxConfig minimax_m2.MiniMaxM2Config",
    "Mistral": "mistral.MistralConfig ministral.MinistralConfig mixtral.MixtralConfig mistral4.Mistral4Config",
    "Phi": "phi.PhiConfig phi3.Phi3Config phi4_multimodal.Phi4MultimodalConfig phimoe.PhimoeConfig",
    "Granite": "granite.GraniteConfig granitemoe.GraniteMoeConfig granitemoehybrid.GraniteMoeHybridConfig",
    "gpt-oss": "gpt_oss.GptOssConfig",
}
#: Our word -> the attributes that classes have for it; the first that is a number counts.
WORDS = {
    "hidden": "hidden_size",
    "q_lora": "q_lora_rank",
    "kv_lora": "kv_lora_rank",
    "width": "intermediate_size ffn_hidden_size",
    "moe_width": "moe_intermediate_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "experts": "n_routed_experts num_experts num_local_experts",
    "top_k": "num_experts_per_tok num_experts_per_token",
    "groups": "n_group num_expert_group",
    "topk_group": "topk_group",
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
}
ACTIVATIONS = {"silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu2", "quick_gelu"}


def row(family: str, module: str, name: str) -> dict[str, Any]:
    """A class's sizes. Raises ValueError that says why it has none."""
    try:
        cls = getattr(import_module(module), name)
        config = cls()
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    values = config.to_dict() | {key: value for key, value in vars(config).items() if not key.startswith("_")}

    def first(attributes: str) -> int | None:
        found = (values.get(attribute) for attribute in attributes.split())
        return next((max(x) if isinstance(x, list) else x for x in found if isinstance(x, (int, list)) and x), None)

    sizes = {word: size for word, attributes in WORDS.items() if (size := first(attributes)) is not None}
    if "hidden" not in sizes or not {"width", "moe_width"} & set(sizes) or "num_attention_heads" not in values:
        raise ValueError("its defaults have no sizes of layers")
    if sizes.get("top_k", 0) > sizes.get("experts", math.inf) or "top_k" not in sizes or "experts" not in sizes:
        sizes = {word: size for word, size in sizes.items() if word not in ("experts", "top_k", "groups", "topk_group", "moe_width")}
    heads, mla = values["num_attention_heads"], values.get("qk_rope_head_dim")
    head_dim = mla or values.get("head_dim") or sizes["hidden"] // heads
    parameters = values.get("rope_parameters") or {}
    partial = 1 if mla else values.get("partial_rotary_factor") or parameters.get("partial_rotary_factor") or 1
    return {
        "model": f"{family}: {name}",
        "source": f"{module.replace('.', '/')}.py, {name}",
        **sizes,
        "heads": heads,
        "kv_heads": 1 if mla else values.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "rotary_dim": int(head_dim * partial) // 2 * 2,
        "activation": next(x for x in (values.get("hidden_activation"), values.get("hidden_act"), "silu") if x in ACTIVATIONS),
    }


def table() -> dict[str, Any]:
    models, left_out = [], {}
    for family, classes in FAMILIES.items():
        for path in classes.split():
            file, _, name = path.lstrip("/").partition(".")
            module = f"sglang.srt.configs.{file}" if path.startswith("/") else f"transformers.models.{file}.configuration_{file}"
            try:
                models.append(row(family, module, name))
            except ValueError as reason:
                left_out[f"{family}: {module}.{name}"] = str(reason)
    return {"models": models, "left_out": left_out}


if __name__ == "__main__":
    json.dump(table(), sys.stdout, indent=1)
    print()
