# SPDX-License-Identifier: Apache-2.0
"""Models of many classes with random weights: which of their layers are bound, and that this changes nothing but rounding.

Each is served twice by SGLang's own model runner, with its layers left to SGLang and on ``reference``. What another rounding may do to
the logprobs is measured on SGLang's own layers, whose results are moved by some units in the last place.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import planted_mistakes, planted_moe_mistakes

RUNNER = Path(__file__).with_name("model_runner.py")
LEFT, ON_REFERENCE = {"SGLANG_FL_OOT_ENABLED": "0"}, {"SGLANG_FL_PREFER": "reference", "SGLANG_FL_STRICT": "1"}
BOUND = "forward_reference.torch"
#: Units in the last place by which the results of two correct implementations of a layer may differ here, and then some.
ULPS = 8
_SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 4}
_VISION = {"in_channels": 3, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_size": 64, "depth": 1}
_IMAGES = {"vision_start_token_id": 1, "vision_token_id": 2, "image_token_id": 3, "video_token_id": 4, "vision_end_token_id": 0}
_LLAMA = {"RMSNorm": 5, "RotaryEmbedding": 1, "SiluAndMul": 2}
_EXPERTS = {"TopK": 2, "UnquantizedFusedMoEMethod": 2}


def _llama(rope: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return _SIZE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 1e4, "rope_scaling": rope} | more


def _model(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return _SIZE | {"model_type": model_type, "architectures": [architecture], "rope_theta": 1e4, "head_dim": 16} | more


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 128} | more


#: name -> (config.json, layer class -> how many are bound)
MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "llama": (_llama(), _LLAMA),
    "llama, odd sizes and biases": (
        _llama(
            hidden_size=60,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=20,
            intermediate_size=88,  # its rows are whole 16 bytes in bf16, as SGLang's CUDA kernel asks
            attention_bias=True,
            mlp_bias=True,
        ),
        _LLAMA,
    ),
    "llama, partial rotary": (_llama(partial_rotary_factor=0.5), _LLAMA),
    "llama 3.1": (
        _llama(_rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
        {"RMSNorm": 5, "Llama3RotaryEmbedding": 1, "SiluAndMul": 2},
    ),
    "linear": (_llama(_rope("linear")), {"RMSNorm": 5, "LinearScalingRotaryEmbedding": 1, "SiluAndMul": 2}),
    "dynamic": (_llama(_rope("dynamic")), {"RMSNorm": 5, "DynamicNTKScalingRotaryEmbedding": 1, "SiluAndMul": 2}),
    "yarn": (_llama(_rope("yarn")), {"RMSNorm": 5, "YaRNScalingRotaryEmbedding": 1, "SiluAndMul": 2}),
    "qwen2": (_model("qwen2", "Qwen2ForCausalLM"), _LLAMA),
    "qwen3": (_model("qwen3", "Qwen3ForCausalLM"), _LLAMA | {"RMSNorm": 9}),
    "gemma": (
        _model("gemma", "GemmaForCausalLM", hidden_activation="gelu_pytorch_tanh"),
        {"GeluAndMul": 2, "RMSNorm": 5, "RotaryEmbedding": 1},
    ),
    "gemma 2": (
        _model(
            *("gemma2", "Gemma2ForCausalLM"),
            sliding_window=16,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=16,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
        {"GeluAndMul": 2, "GemmaRMSNorm": 9, "RotaryEmbedding": 1},
    ),
    "gemma 3": (
        _model("gemma3_text", "Gemma3ForCausalLM", sliding_window=16, hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True),
        {"Gemma3RMSNorm": 13, "GeluAndMul": 2, "RotaryEmbedding": 1},
    ),
    "gpt-2": (
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "vocab_size": 512,
        },
        {"NewGELU": 2},
    ),
    "phi-3, longrope": (
        _model(
            *("phi3", "Phi3ForCausalLM"),
            pad_token_id=0,
            original_max_position_embeddings=128,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        ),
        {"RMSNorm": 5, "SiluAndMul": 2},
    ),
    "olmo 2": (_model("olmo2", "Olmo2ForCausalLM"), _LLAMA | {"RMSNorm": 9}),
    "glm 4": (_model("glm4", "Glm4ForCausalLM", partial_rotary_factor=0.5, attention_bias=True), _LLAMA | {"RMSNorm": 9}),
    "arcee": (_model("arcee", "ArceeForCausalLM", hidden_act="relu2"), {"RMSNorm": 5, "ReLU2": 1, "RotaryEmbedding": 1}),
    "cohere 2": (_model("cohere2", "Cohere2ForCausalLM", sliding_window=16), {"RotaryEmbedding": 1, "SiluAndMul": 2}),
    "stablelm": (_model("stablelm", "StableLmForCausalLM"), {"RotaryEmbedding": 1, "SiluAndMul": 2}),
    "mixtral": (_model("mixtral", "MixtralForCausalLM", num_local_experts=4), {"RMSNorm": 5, "RotaryEmbedding": 1} | _EXPERTS),
    "qwen3 moe": (
        _model("qwen3_moe", "Qwen3MoeForCausalLM", **_MOE, num_experts=8, norm_topk_prob=True),
        {"RMSNorm": 9, "RotaryEmbedding": 1} | _EXPERTS,
    ),
    "olmoe": (
        _model("olmoe", "OlmoeForCausalLM", **_MOE, num_experts=8, norm_topk_prob=False),
        {"RMSNorm": 9, "RotaryEmbedding": 1} | _EXPERTS,
    ),
    "granite moe": (
        _model("granitemoe", "GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
        {"RMSNorm": 5, "RotaryEmbedding": 1} | _EXPERTS,
    ),
    "glm 4 moe, groups": (
        _model(
            *("glm4_moe", "Glm4MoeForCausalLM"),
            **_MOE,
            n_routed_experts=8,
            n_shared_experts=2,
            first_k_dense_replace=0,
            n_group=4,
            topk_group=2,
            norm_topk_prob=False,
            routed_scaling_factor=2.5,
            partial_rotary_factor=0.5,
            attention_bias=True,
            use_qk_norm=False,
        ),
        _LLAMA | _EXPERTS,
    ),
    "phi moe": (_model("phimoe", "PhiMoEForCausalLM", num_local_experts=4), {"RotaryEmbedding": 1, "UnquantizedFusedMoEMethod": 2}),
    "qwen2 vl": (
        _model(
            *("qwen2_vl", "Qwen2VLForConditionalGeneration"),
            rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
            vision_config=_VISION | {"embed_dim": 32, "patch_size": 14, "mlp_ratio": 2, "hidden_act": "quick_gelu", "in_chans": 3},
            **_IMAGES,
        ),
        {"MRotaryEmbedding": 1, "QuickGELU": 1, "RMSNorm": 5, "SiluAndMul": 2},
    ),
    "qwen3 vl": (
        _model(
            *("qwen3_vl", "Qwen3VLForConditionalGeneration"),
            text_config=_model(
                *("qwen3_vl_text", ""),
                attention_bias=False,
                rope_scaling={"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True},
            ),
            vision_config=_VISION
            | {"hidden_size": 32, "out_hidden_size": 64, "patch_size": 16, "intermediate_size": 64, "num_position_embeddings": 64}
            | {"hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": []},
            **_IMAGES,
        ),
        {"MRotaryEmbedding": 1, "RMSNorm": 9, "RotaryEmbedding": 1, "SiluAndMul": 2},
    ),
}


class Runner:
    """The process that SGLang is imported in."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.log = directory / "runner.log"
        path = os.pathsep.join(filter(None, (str(RUNNER.parent), os.environ.get("PYTHONPATH"))))  # for planted mistakes
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(RUNNER)],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
            )

    def run(
        self, config: dict[str, Any], environ: dict[str, str], rounded_otherwise: int = 0, ulps: int = ULPS, **arguments: Any
    ) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
        """Which layers are bound, the logprobs, and those with layers that round otherwise."""
        assert self.process.stdin is not None and self.process.stdout is not None
        out = self.directory / "result"
        task = {"config": config, "environ": environ, "arguments": {"dtype": "float32"} | arguments, "out": str(out)}
        task |= {"rounded_otherwise": rounded_otherwise, "ulps": ulps}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the runner is gone"}
        assert "error" not in answer, f"{answer['error']}\n{self.log.read_text(errors='replace')[-3000:]}"
        logprobs, others = torch.load(out)
        return answer["bound"], logprobs, others

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with Runner(tmp_path_factory.mktemp("models")) as runner:
        yield runner


@pytest.mark.parametrize("name", MODELS)
def test_binding_changes_nothing_but_rounding(runner: Runner, name: str) -> None:
    config, expected = MODELS[name]
    left, native, others = runner.run(config, LEFT, rounded_otherwise=3)
    bound, ours, _ = runner.run(config, ON_REFERENCE)
    assert {forward for counts in left.values() for forward in counts}.isdisjoint({BOUND})
    assert {layer: counts[BOUND] for layer, counts in bound.items() if BOUND in counts} == expected
    assert torch.equal(ours.argmax(-1), native.argmax(-1))
    allowed, off = allowed_by_rounding(native, others), furthest(ours, native)
    assert allowed < 1e-3, "which shows more than rounding"
    print(f"{name}: off by {off / allowed:.3f} of what rounding may cost ({off:.1e} of {allowed:.1e})")
    assert off <= allowed


def test_a_backend_with_flagos_signatures_serves_mrope(runner: Runner) -> None:
    """As the reference does, which it computes with. test_hybrid.py and test_qwen3_moe.py serve its other operators."""
    config, expected = MODELS["qwen3 vl"]
    environ = {"SGLANG_FL_PREFER": "vendor", "SGLANG_FL_STRICT": "1", "SGLANG_FL_PLUGIN_MODULES": "field_backend"}
    bound, ours, _ = runner.run(config, environ)
    assert {layer: counts.get("forward_vendor.field") for layer, counts in bound.items() if layer in expected} == expected
    assert torch.equal(ours, runner.run(config, ON_REFERENCE)[1])


def test_what_a_plain_cpu_does_not_have_is_said(runner: Runner) -> None:
    """SGLang would say that the user chose the attention backend that this platform chooses."""
    with pytest.raises(AssertionError, match="needs an attention backend that SGLang has made deterministic"):
        runner.run(MODELS["llama"][0], ON_REFERENCE, enable_deterministic_inference=True)


def furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def allowed_by_rounding(native: torch.Tensor, others: list[torch.Tensor]) -> float:
    """By how much two correct runs may differ, since either rounds otherwise than exact arithmetic."""
    allowed = 2 * max(furthest(other, native) for other in others)
    assert allowed > 0, "layers that round otherwise show"
    return allowed


@pytest.mark.parametrize(
    ("name", "module", "mistakes"),
    [
        ("llama", "planted_mistakes", planted_mistakes.MISTAKES),
        # The trial refuses "the next expert" before anything is served.
        ("qwen3 moe", "planted_moe_mistakes", tuple(m for m in planted_moe_mistakes.MISTAKES if m != "the next expert")),
    ],
)
def test_a_planted_mistake_is_more_than_rounding(runner: Runner, tmp_path: Path, name: str, module: str, mistakes: tuple[str, ...]) -> None:
    config, _ = MODELS[name]
    _, native, others = runner.run(config, LEFT, rounded_otherwise=3)
    planted = tmp_path / "mistake"
    environ = {"SGLANG_FL_PLUGIN_MODULES": module, "PLANTED_MISTAKE": str(planted)}
    environ |= ON_REFERENCE if "moe" in module else {"SGLANG_FL_PREFER": "vendor", "SGLANG_FL_STRICT": "1"}
    allowed = allowed_by_rounding(native, others)
    off = {}
    for mistake in ("none", *mistakes):
        planted.write_text(mistake)
        off[mistake] = furthest(runner.run(config, environ)[1], native) / allowed
    print({mistake: f"{ratio:.3g}" for mistake, ratio in off.items()})
    assert off.pop("none") <= 1 < min(off.values())
