# SPDX-License-Identifier: Apache-2.0
"""What a plain CPU cannot serve is refused while SGLang resolves its arguments."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.test_model_classes import MODELS
from sglang.srt.server_args import ServerArgs

from sglang_fl.platform import cpu_limits

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine is no plain CPU")
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
QWEN3 |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512}
MLA = QWEN3 | {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 32, "q_lora_rank": None}
MLA |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "moe_intermediate_size": 32}
QUANTISED = QWEN3 | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
CAPPED = QWEN3 | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attn_logit_softcapping": 50.0}
HYBRID = QWEN3 | {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def resolve(tmp_path: Path) -> Any:
    def resolve(config: dict[str, Any] = QWEN3, **arguments: Any) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        args = ServerArgs(model_path=str(tmp_path), load_format="dummy", skip_tokenizer_init=True, **arguments)
        args.resolve_once()
        return args.resolved_dict()

    return resolve


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"quantization": "fp8"}, "--quantization fp8: its kernels are Triton's"),
        ({"enable_lora": True, "lora_target_modules": ["q_proj"], "max_lora_rank": 8}, "--enable-lora: "),
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm NGRAM: SGLang has no draft-model attention"),
        ({"enable_dp_attention": True}, "--enable-dp-attention: "),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache: "),
        ({"enable_memory_saver": True}, "--enable-memory-saver: "),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference: it needs an attention backend"),
        ({"attention_backend": "triton"}, "--attention-backend triton: of SGLang's attention backends only torch_native"),
        ({"decode_attention_backend": "triton"}, "--decode-attention-backend triton: "),
        ({"config": MLA}, "--model-path: the model has latent attention (MLA)"),
        ({"config": QUANTISED}, "--model-path: the model's weights are quantised (fp8)"),
        ({"config": CAPPED}, "--model-path: the model caps its attention logits"),
    ],
)
def test_an_argument_is_refused_by_name(resolve: Any, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="a plain CPU cannot serve") as refused:
        resolve(**arguments)
    (line,) = str(refused.value).splitlines()[1:]
    assert line.startswith(f"  - {named}")


def test_all_are_named_at_once(resolve: Any) -> None:
    with pytest.raises(ValueError, match="a plain CPU cannot serve") as refused:
        resolve(QUANTISED, enable_memory_saver=True, attention_backend="flashinfer")
    assert len(str(refused.value).splitlines()) == 4


def test_what_it_can_serve_is_not_refused(resolve: Any) -> None:
    arguments = {"attention_backend": "torch_native", "quantization": "unquant", "kv_cache_dtype": "fp8_e4m3", "enable_torch_compile": True}
    assert resolve(**arguments)["attention_backend"] == "torch_native"


@pytest.mark.parametrize("given", [{}, {"mamba_radix_cache_strategy": "auto"}])
def test_a_hybrid_model_keeps_no_snapshots(resolve: Any, given: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    resolved = resolve(HYBRID, **given)
    assert (resolved["mamba_radix_cache_strategy"], resolved["disable_overlap_schedule"]) == ("no_buffer", True)
    assert len([record for record in caplog.records if "keeps no state snapshots" in record.message]) == 1


def test_pages_that_need_snapshots_are_refused_by_name(resolve: Any) -> None:
    with pytest.raises(ValueError, match="--page-size 16: this platform keeps no state snapshots of hybrid models"):
        resolve(HYBRID, page_size=16)
    assert resolve(HYBRID, page_size=16, disable_radix_cache=True)["page_size"] == 16


def test_other_models_keep_the_overlap_schedule(resolve: Any) -> None:
    assert not resolve()["disable_overlap_schedule"]


@pytest.mark.parametrize("name", MODELS)
def test_no_kind_of_model_needs_a_flag(resolve: Any, name: str) -> None:
    assert resolve(MODELS[name][0])["attention_backend"] == "torch_native"


def test_the_list_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "support.md").read_text(encoding="utf-8")
    for name in (*cpu_limits.LIMITS, "attention_backend"):
        assert f"`--{name.replace('_', '-')}" in text, name


def test_requests_that_would_end_the_scheduler(resolve: Any) -> None:
    resolve()
    from sglang.srt.managers.io_struct import ProfileReq
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    for name in ("release_memory_occupation", "resume_memory_occupation"):
        with pytest.raises(ValueError, match="a plain CPU cannot release and resume memory"):
            asyncio.run(getattr(TokenizerManager, name)(None, None))
    with pytest.raises(ValueError, match="supports only the activity CPU, not MEM"):
        asyncio.run(TokenizerManager.start_profile(None, ProfileReq(activities=["CPU", "MEM"])))
