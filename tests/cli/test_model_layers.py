# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_fl.cli import model_layers as layers_of_models
from sglang_fl.cli.model_layers import model_layers
from sglang_fl.config import Settings
from sglang_fl.dispatch.ops import OPERATORS

Ops = Callable[..., dict[str, Any]]
Cli = Callable[..., "pytest.CaptureResult[str]"]
Model = Callable[[Any], str]
Destinations = Callable[..., dict[str, str]]
REFERENCE, TESTCHIP = "reference(reference.torch)", "vendor(vendor.testchip)"


QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
}

QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rms_norm_eps": 1e-06,
}


@pytest.fixture
def destinations(ops: Ops, model: Model) -> Destinations:
    """Layer class of a model -> what it runs on."""

    def run(config: Any, **environ: str) -> dict[str, str]:
        return {layer["class_name"]: layer["destination"] for layer in ops("--model", model(config), **environ)["layers"]}

    return run


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (
            QWEN3,
            {
                ("RMSNorm", "rms_norm", "hidden_size 1024, eps 1e-06"),
                ("SiluAndMul", "silu_and_mul", "intermediate_size 3072"),
                ("RotaryEmbedding", "rotary_embedding", "head_dim 128, 16 heads, 8 kv heads"),
            },
        ),
        (
            LLAMA,
            {
                ("RMSNorm", "rms_norm", "hidden_size 4096, eps 1e-05"),
                ("SiluAndMul", "silu_and_mul", "intermediate_size 14336"),
                ("Llama3RotaryEmbedding", "rotary_embedding", "head_dim 128, 32 heads, 8 kv heads"),
            },
        ),
        (
            QWEN2,
            {
                ("RMSNorm", "rms_norm", "hidden_size 896, eps 1e-06"),
                ("SiluAndMul", "silu_and_mul", "intermediate_size 4864"),
                ("RotaryEmbedding", "rotary_embedding", "head_dim 64, 14 heads, 2 kv heads"),
            },
        ),
        (
            QWEN3_MOE,
            {
                ("RMSNorm", "rms_norm", "hidden_size 2048, eps 1e-06"),
                ("SiluAndMul", "silu_and_mul", "intermediate_size 6144"),
                ("RotaryEmbedding", "rotary_embedding", "head_dim 128, 32 heads, 4 kv heads"),
                ("TopK", "topk", "128 experts, 8 a token"),
                ("UnquantizedFusedMoEMethod", "fused_moe", "128 experts, hidden_size 2048, moe_intermediate_size 768"),
            },
        ),
    ],
    ids=["qwen3", "llama3", "qwen2", "qwen3-moe"],
)
def test_layers_of_a_model(ops: Ops, model: Model, config: dict[str, Any], layers: set[tuple[str, str, str]]) -> None:
    directory = model(config)
    for place in (directory, f"{directory}/config.json"):
        found = ops("--model", place)["layers"]
        assert {(layer["class_name"], layer["op"], layer["size"]) for layer in found} == layers
        assert {layer["destination"] for layer in found} == {REFERENCE}


GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "rms_norm_eps": 1e-06,
}


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (
            GEMMA3,
            {
                ("Gemma3RMSNorm", "gemma_rms_norm", "hidden_size 1152, eps 1e-06"),
                ("GeluAndMul", "gelu_and_mul", "intermediate_size 6912"),
                ("RotaryEmbedding", "rotary_embedding", "head_dim 256, 4 heads, 1 kv heads"),
            },
        ),
        # The default of an argument of its MLP.
        ({"architectures": ["GPT2LMHeadModel"]}, {("NewGELU", "new_gelu", "")}),
        # By get_act_fn and the configuration.
        (
            {"architectures": ["PhiForCausalLM"], "hidden_act": "gelu_new", "hidden_size": 2560, "num_attention_heads": 32},
            {("NewGELU", "new_gelu", ""), ("RotaryEmbedding", "rotary_embedding", "head_dim 80, 32 heads, 32 kv heads")},
        ),
        # Its LayerNorm is a class of its own, and no layer of SGLang's.
        (
            {"architectures": ["CohereForCausalLM"], "hidden_size": 4096, "num_attention_heads": 64, "intermediate_size": 22528},
            {
                ("SiluAndMul", "silu_and_mul", "intermediate_size 22528"),
                ("RotaryEmbedding", "rotary_embedding", "head_dim 64, 64 heads, 64 kv heads"),
            },
        ),
    ],
    ids=["gemma3", "gpt2", "phi", "cohere"],
)
def test_layers_of_further_models(ops: Ops, model: Model, config: Any, layers: set[tuple[str, str, str]]) -> None:
    found = ops("--model", model(config))["layers"]
    assert {(layer["class_name"], layer["op"], layer["size"]) for layer in found} == layers


def test_a_list_that_names_an_operators_first_class_leaves_those_beside_it(destinations: Destinations) -> None:
    for listed, expected in (("GemmaRMSNorm", REFERENCE), ("Gemma3RMSNorm", "sglang (oot_blacklist)")):
        assert destinations(GEMMA3, SGLANG_FL_OOT_BLACKLIST=listed)["Gemma3RMSNorm"] == expected


@pytest.mark.parametrize(
    ("rope", "class_name"),
    [
        ({}, "RotaryEmbedding"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "RotaryEmbedding"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "Llama3RotaryEmbedding"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "LinearScalingRotaryEmbedding"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "YaRNScalingRotaryEmbedding"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "DynamicNTKScalingRotaryEmbedding"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "MRotaryEmbedding"),
    ],
)
def test_class_of_the_rotary_embedding(destinations: Destinations, rope: dict[str, Any], class_name: str) -> None:
    layers = destinations({key: value for key, value in QWEN3.items() if key != "rope_scaling"} | rope)
    assert layers.keys() == {"RMSNorm", "SiluAndMul", class_name}
    assert layers[class_name] == REFERENCE


def test_a_list_that_names_a_class_means_those_that_derive_from_it(destinations: Destinations) -> None:
    rope = {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}
    found = destinations(QWEN3 | rope, SGLANG_FL_OOT_BLACKLIST="RotaryEmbedding")
    assert found["MRotaryEmbedding"] == "sglang (oot_blacklist)"


def test_sizes_of_a_model_that_has_a_text_config(ops: Ops, model: Model) -> None:
    found = ops("--model", model({"architectures": ["Qwen3ForCausalLM"], "hidden_size": 7, "text_config": QWEN3}))["layers"]
    assert "hidden_size 1024, eps 1e-06" in [layer["size"] for layer in found]


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"SGLANG_FL_OOT_BLACKLIST": "RMSNorm"}, {"RMSNorm": "sglang (oot_blacklist)", "SiluAndMul": REFERENCE}),
        ({"SGLANG_FL_OOT_BLACKLIST": "RotaryEmbedding"}, {"Llama3RotaryEmbedding": "sglang (oot_blacklist)"}),
        ({"SGLANG_FL_OOT_BLACKLIST": "Llama3RotaryEmbedding"}, {"Llama3RotaryEmbedding": "sglang (oot_blacklist)"}),
        ({"SGLANG_FL_OOT_BLACKLIST": "YaRNScalingRotaryEmbedding"}, {"Llama3RotaryEmbedding": REFERENCE}),
        ({"SGLANG_FL_OOT_WHITELIST": "RMSNorm"}, {"RMSNorm": REFERENCE, "SiluAndMul": "sglang (not in oot_whitelist)"}),
        ({"SGLANG_FL_OOT_WHITELIST": "RotaryEmbedding"}, {"Llama3RotaryEmbedding": REFERENCE, "RMSNorm": "sglang (not in oot_whitelist)"}),
        ({"SGLANG_FL_OOT_WHITELIST": ","}, {"RMSNorm": "sglang (not in oot_whitelist)"}),
        ({"SGLANG_FL_PER_OP": "rms_norm=sglang"}, {"RMSNorm": "sglang", "SiluAndMul": REFERENCE}),
        ({"SGLANG_FL_OOT_ENABLED": "0"}, {"RMSNorm": "sglang (Layer 2 is off)"}),
    ],
)
def test_settings_decide_where_layers_go(destinations: Destinations, environ: dict[str, str], wanted: dict[str, str]) -> None:
    assert wanted.items() <= destinations(LLAMA, **environ).items()


def test_quantised_experts_stay_with_sglang(destinations: Destinations) -> None:
    found = destinations({**QWEN3_MOE, "quantization_config": {"quant_method": "fp8"}})
    assert found["FusedMoE"] == "sglang (quantized experts)"
    assert found["TopK"] == REFERENCE and "UnquantizedFusedMoEMethod" not in found


def test_layers_that_no_operator_is_for(ops: Ops, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: op for name, op in layers_of_models._KNOWN.items() if name != "GeluAndMul"}
    monkeypatch.setattr(layers_of_models, "_KNOWN", known)
    monkeypatch.setattr(layers_of_models, "NOT_COVERED_CLASSES", {"GeluAndMul"})
    found = {layer["class_name"]: layer for layer in ops("--model", model({"architectures": ["Gemma3nForCausalLM"]}))["layers"]}
    assert found["Gemma3nRMSNorm"]["destination"] == "sglang (it overrides forward)"
    assert found["GeluAndMul"]["op"] is None
    assert found["GeluAndMul"]["destination"] == "sglang (sglang-fl has no operator for it)"


def test_table_of_layers(cli: Cli, model: Model) -> None:
    told = cli("ops", "--model", model(LLAMA)).out
    for text in ("Layers of ", "Llama3RotaryEmbedding", "head_dim 128, 32 heads, 8 kv heads", REFERENCE):
        assert text in told


def failing_ops(cli: Cli, directory: str) -> str:
    printed = cli("ops", "--model", directory, code=2)
    assert printed.out == ""
    return printed.err


@pytest.mark.parametrize("architectures", [["FooForCausalLM"], [], None])
def test_unknown_architecture(cli: Cli, model: Model, architectures: Any) -> None:
    directory = model({"architectures": architectures})
    told = failing_ops(cli, directory)
    words = (directory, "no model of its own for the architecture", "Transformers backend", str(architectures))
    assert all(word in told for word in words)


def test_a_model_without_such_layers_is_said_to_have_none(cli: Cli, model: Model) -> None:
    assert "has an operator in sglang-fl" in cli("ops", "--model", model({"architectures": ["OPTForCausalLM"]})).out


def test_sizes_that_a_configuration_does_not_have_are_left_out(ops: Ops, model: Model) -> None:
    """Mixtral has no moe_intermediate_size: all of its experts are of the one size."""
    config = {"hidden_size": 64, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
    found = {layer["op"]: layer["size"] for layer in ops("--model", model({"architectures": ["MixtralForCausalLM"], **config}))["layers"]}
    assert found == {
        "fused_moe": "4 experts, hidden_size 64, moe_intermediate_size 128",
        "rms_norm": "hidden_size 64, eps 1e-05",
        "rotary_embedding": "",
        "topk": "4 experts, 2 a token",
    }
    found = {layer["op"]: layer["size"] for layer in ops("--model", model({"architectures": ["MixtralForCausalLM"]}))["layers"]}
    assert set(found.values()) == {""}


@pytest.mark.parametrize("architecture", ["OPTForCausalLM", "MiniCPMV", "LlavaForConditionalGeneration"])
def test_architecture_that_sglang_has_and_no_layer_of_which_is_known(cli: Cli, model: Model, architecture: str) -> None:
    assert "SGLang has no model" not in cli("ops", "--model", model({"architectures": [architecture]})).err


def test_no_config_json(cli: Cli, tmp_path: Path) -> None:
    assert failing_ops(cli, str(tmp_path)) == f"sglang-fl: --model: there is no file '{tmp_path}/config.json'\n"
    assert str(tmp_path / "none") in failing_ops(cli, str(tmp_path / "none"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{'architectures'",
        "[]",
        "3",
        '{"architectures": 3}',
        '{"architectures": "Qwen3ForCausalLM"}',
        '{"architectures": ["Qwen3ForCausalLM"], "rope_scaling": "linear"}',
        '{"architectures": ["Qwen3ForCausalLM"], "rope_scaling": {"type": ["linear"]}}',
        '{"architectures": ["Qwen3ForCausalLM"], "text_config": 3}',
        '{"architectures": ["Qwen3ForCausalLM"], "hidden_size": "1024", "num_attention_heads": 16}',
    ],
)
def test_broken_config_json(cli: Cli, model: Model, text: str) -> None:
    """An error that names the file, not a traceback."""
    directory = model(text)
    assert f"{directory}/config.json" in failing_ops(cli, directory)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("Llama4ForConditionalGeneration", {"RMSNorm", "SiluAndMul", "RotaryEmbedding"}),
        ("DeepseekV3ForCausalLM", {"RMSNorm", "SiluAndMul", "RotaryEmbedding"}),
        ("Gemma3ForCausalLM", {"Gemma3RMSNorm", "GeluAndMul", "RotaryEmbedding"}),
    ],
)
def test_layers_made_in_roundabout_ways_are_found(architecture: str, expected: set[str], tmp_path: Path) -> None:
    """Imported inside a function, or made by a wrapper of SGLang's."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "hidden_size": 64}))
    assert expected <= {layer.class_name for layer in model_layers(tmp_path, dict.fromkeys(OPERATORS, "here"), Settings())}
