# SPDX-License-Identifier: Apache-2.0
"""SGLang 0.5.23's layer classes and functions by operator, as names: this file imports nothing of SGLang.

The first class of each operator is the one whose forward the operator's signature describes; the
others are its subclasses, or have a bridge of their own (:data:`STANDALONE_CLASSES`). Which of them a bridge takes over is the
bridge's to say; all of them may stand in ``oot_whitelist`` and ``oot_blacklist``. A test holds the lists against the installed SGLang.
"""

from .kernel_implementations import is_kernel


def _classes(*homes: str) -> tuple[tuple[str, str], ...]:
    """(module, class) of each class in ``"module: Class Class"``; the modules are below ``sglang.srt``."""
    split = (home.split(": ") for home in homes)
    return tuple((f"sglang.srt.{module}", name) for module, names in split for name in names.split())


#: operator -> (module, class), the class described by the operator's signature first.
LAYERS: dict[str, tuple[tuple[str, str], ...]] = {
    "gelu_and_mul": _classes("layers.activation: GeluAndMul"),
    "gemma_rms_norm": _classes("layers.layernorm: GemmaRMSNorm Gemma3RMSNorm"),
    "layer_norm": _classes("layers.layernorm: LayerNorm"),
    "new_gelu": _classes("layers.activation: NewGELU"),
    "quick_gelu": _classes("layers.activation: QuickGELU"),
    "relu2": _classes("layers.activation: ReLU2"),
    "silu_and_mul": _classes("layers.activation: SiluAndMul", "models.beam: BeamSiluAndMul"),
    "rms_norm": _classes(
        "layers.layernorm: RMSNorm Gemma4RMSNorm RMSNormWithoutScale",
        "models.gemma3n_causal: Gemma3nRMSNorm",
        "models.glm4v: Glm4vRMSNorm",
        "models.glm_ocr: GlmOcrRMSNorm",
    ),
    "rotary_embedding": _classes(
        "layers.rotary_embedding.base: RotaryEmbedding LinearScalingRotaryEmbedding",
        "layers.rotary_embedding.bailing_mrope: BailingMRotaryEmbedding",
        "layers.rotary_embedding.rope_variant: DeepseekScalingRotaryEmbedding DynamicNTKAlphaRotaryEmbedding",
        "layers.rotary_embedding.rope_variant: DynamicNTKScalingRotaryEmbedding Gemma4RotaryEmbedding",
        "layers.rotary_embedding.rope_variant: Llama3RotaryEmbedding Llama4VisionRotaryEmbedding",
        "layers.rotary_embedding.yarn: YaRNScalingRotaryEmbedding",
        "models.beam: BeamRotaryEmbedding",
        "models.grok: ScalingRotaryEmbedding",
    ),
    "mrotary_embedding": _classes("layers.rotary_embedding.mrope: MRotaryEmbedding Ernie4_5_VLRotaryEmbedding YaRNScalingMRotaryEmbedding"),
    "fused_moe": _classes(
        "layers.quantization.unquant: UnquantizedFusedMoEMethod",
        "hardware_backend.npu.quantization.online_moe_methods: NPUMXFP8OnlineMoEMethod",
        "models.beam: BeamUnquantizedFusedMoEMethod",
        "models.inkling_common.dense_mlp: _InklingUnquantizedFusedMoEMethod",
    ),
    "topk": _classes("layers.moe.topk: TopK"),
}

#: SGLang's layer class -> its operator. Orders may be given under its name.
OPERATOR_OF_CLASS = {layers[0][1]: op for op, layers in LAYERS.items()}
#: Operators whose class derives from another operator's class: naming that one in a list means both.
DERIVED = {"mrotary_embedding": "rotary_embedding"}
#: Classes that do an operator's work under a bridge of their own, and derive from none of its other classes.
STANDALONE_CLASSES = frozenset({"Gemma3RMSNorm", "Gemma4RMSNorm", "RMSNormWithoutScale"})

#: operator -> (module, function) that SGLang calls, and not as a layer. The lists of classes may name it, too.
FUNCTIONS: dict[str, tuple[str, str]] = {
    "chunk_gated_delta_rule": ("sglang.kernels.ops.attention.fla.chunk", "chunk_gated_delta_rule"),
    "fused_recurrent_gated_delta_rule_packed_decode": (
        "sglang.kernels.ops.attention.fla.fused_recurrent",
        "fused_recurrent_gated_delta_rule_packed_decode",
    ),
    "fused_sigmoid_gating_delta_rule_update": (
        "sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent",
        "fused_sigmoid_gating_delta_rule_update",
    ),
    "causal_conv1d_fn": ("sglang.kernels.ops.mamba.causal_conv1d_triton", "causal_conv1d_fn"),
    "causal_conv1d_update": ("sglang.kernels.ops.mamba.causal_conv1d_triton", "causal_conv1d_update"),
}

#: Every class and function that the lists may name.
CLASSES = frozenset(name for layers in LAYERS.values() for _, name in layers) | {name for _, name in FUNCTIONS.values()}

#: Layer classes and a function that settings of FlagOS name, and that this version does not cover: they stay with SGLang.
#: (The function has an operator; nothing in SGLang calls it.)
NOT_COVERED_CLASSES = frozenset({"FusedMoE", "Mixer2RMSNormGated", "fused_recurrent_gated_delta_rule"})

#: Those that have a forward of their own, and so always stay with SGLang.
CUSTOM_FORWARD = frozenset(
    {"BailingMRotaryEmbedding", "DeepseekScalingRotaryEmbedding", "Ernie4_5_VLRotaryEmbedding", "Llama4VisionRotaryEmbedding"}
    | {"Gemma3nRMSNorm", "Glm4vRMSNorm", "GlmOcrRMSNorm"}
)


def names_in_lists(class_name: str, op: str) -> set[str]:
    """The names under which the lists of classes may mean one: its own, and those of the catalog that it derives from."""
    if class_name in STANDALONE_CLASSES or op in FUNCTIONS or is_kernel(op):
        return {class_name}
    return {class_name, *(LAYERS[base][0][1] for base in (op, DERIVED.get(op)) if base)}


def classes_of(op: str) -> list[str]:
    """The classes, or the function, that a bridge may give to an operator; none if there is no bridge for it."""
    if is_kernel(op):
        return [op.partition(":")[2]]
    if op in FUNCTIONS:
        return [FUNCTIONS[op][1]]
    return [name for _, name in LAYERS.get(op, ()) if name not in CUSTOM_FORWARD]
