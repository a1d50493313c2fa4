# SPDX-License-Identifier: Apache-2.0
"""SGLang 0.5.23's layer classes by operator, as names: this file imports nothing of SGLang.

The first class of each operator is the one whose forward the operator's signature describes; the
others are its subclasses. Which of them a bridge takes over is the bridge's to say; all of them may
stand in ``oot_whitelist`` and ``oot_blacklist``. A test holds the lists against the installed SGLang.
"""

#: operator -> (module, class), the class described by the operator's signature first.
LAYERS: dict[str, tuple[tuple[str, str], ...]] = {
    "silu_and_mul": (
        ("sglang.srt.layers.activation", "SiluAndMul"),
        ("sglang.srt.models.beam", "BeamSiluAndMul"),
    ),
    "rms_norm": (
        ("sglang.srt.layers.layernorm", "RMSNorm"),
        ("sglang.srt.models.gemma3n_causal", "Gemma3nRMSNorm"),
        ("sglang.srt.models.glm4v", "Glm4vRMSNorm"),
        ("sglang.srt.models.glm_ocr", "GlmOcrRMSNorm"),
    ),
    "rotary_embedding": (
        ("sglang.srt.layers.rotary_embedding.base", "RotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.base", "LinearScalingRotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.bailing_mrope", "BailingMRotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.mrope", "Ernie4_5_VLRotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.mrope", "MRotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.mrope", "YaRNScalingMRotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.rope_variant", "DeepseekScalingRotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.rope_variant", "DynamicNTKAlphaRotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.rope_variant", "DynamicNTKScalingRotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.rope_variant", "Gemma4RotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.rope_variant", "Llama3RotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.rope_variant", "Llama4VisionRotaryEmbedding"),
        ("sglang.srt.layers.rotary_embedding.yarn", "YaRNScalingRotaryEmbedding"),
        ("sglang.srt.models.beam", "BeamRotaryEmbedding"),
        ("sglang.srt.models.grok", "ScalingRotaryEmbedding"),
    ),
}

#: operator -> (module, function) that SGLang calls, and not as a layer. The lists of classes may name it, too.
FUNCTIONS: dict[str, tuple[str, str]] = {
    "chunk_gated_delta_rule": ("sglang.kernels.ops.attention.fla.chunk", "chunk_gated_delta_rule"),
    "fused_recurrent_gated_delta_rule": ("sglang.kernels.ops.attention.fla.fused_recurrent", "fused_recurrent_gated_delta_rule"),
    "fused_recurrent_gated_delta_rule_packed_decode": (
        "sglang.kernels.ops.attention.fla.fused_recurrent",
        "fused_recurrent_gated_delta_rule_packed_decode",
    ),
}

#: Every class and function that the lists may name.
CLASSES = frozenset(name for layers in LAYERS.values() for _, name in layers) | {name for _, name in FUNCTIONS.values()}

#: Operators and layer classes that backends and settings of FlagOS name, and that this version does not
#: cover: their layers stay with SGLang.
NOT_COVERED_OPERATORS = frozenset(
    {
        "fused_moe",
        "gelu_and_mul",
        "gemma_rms_norm",
        "layer_norm",
        "mrotary_embedding",
        "new_gelu",
        "quick_gelu",
        "relu2",
        "topk",
    }
)
NOT_COVERED_CLASSES = frozenset(
    {
        "FusedMoE",
        "Gemma3RMSNorm",
        "Gemma4RMSNorm",
        "GemmaRMSNorm",
        "GeluAndMul",
        "LayerNorm",
        "Mixer2RMSNormGated",
        "NewGELU",
        "QuickGELU",
        "RMSNormWithoutScale",
        "ReLU2",
        "TopK",
        "UnquantizedFusedMoEMethod",
    }
)

#: Those that have a forward of their own, and so always stay with SGLang.
OVERRIDING = frozenset(
    {
        "BailingMRotaryEmbedding",
        "DeepseekScalingRotaryEmbedding",
        "Ernie4_5_VLRotaryEmbedding",
        "Gemma3nRMSNorm",
        "Glm4vRMSNorm",
        "GlmOcrRMSNorm",
        "Llama4VisionRotaryEmbedding",
        "MRotaryEmbedding",
        "YaRNScalingMRotaryEmbedding",
    }
)
