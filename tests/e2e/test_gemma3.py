# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 on the real SGLang server: its norms multiply with 1 + weight, and its MLPs are gated by GELU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_fl.cli.demo_model import RECITAL

from .conftest import Prompt, Running, make_prompts, off_by, serving
from .gemma3_model import gemma3_model

pytestmark = pytest.mark.e2e

#: SGLang's Gemma 3 rotates by itself, and never calls the rotary embeddings that it makes.
ROTARY = "RotaryEmbedding → sglang(not called: model.layers.*.self_attn.rotary_emb)"


@pytest.fixture(scope="module")
def gemma3() -> Path:
    if torch.accelerator.is_available():
        pytest.skip("these tests are for a plain CPU; make test-gpu serves on a GPU")
    return gemma3_model()


@pytest.fixture(scope="module")
def gemma3_prompts(gemma3: Path) -> list[Prompt]:
    return make_prompts(gemma3, torch.float32)


@pytest.fixture(scope="module")
def running(gemma3: Path, gemma3_prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(gemma3, tmp_path_factory.mktemp("gemma3"), environ={"SGLANG_FL_PREFER": "reference"}) as found:
        yield found


def test_the_recital_is_exact(running: Running) -> None:
    answer = running.recite().json()
    assert answer["choices"][0]["message"]["content"] == RECITAL
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_logprobs_are_within_what_rounding_to_fp32_may_cost(running: Running, gemma3_prompts: list[Prompt]) -> None:
    for prompt in gemma3_prompts:
        assert off_by(running.logprobs(prompt), prompt.exact, prompt.bounds) <= 0.5


def test_every_layer_ran_through_the_dispatch(running: Running) -> None:
    for _ in range(3):  # until it is known what the model does not call
        running.recite()
    assert running.dispatched() == {"Gemma3RMSNorm → reference(reference.torch)", "GeluAndMul → reference(reference.torch)", ROTARY}
    printed = running.server.log.read_text()
    assert "gemma_rms_norm     Gemma3RMSNorm                → reference(reference.torch), 19 layers" in printed
    assert "gelu_and_mul       GeluAndMul                   → reference(reference.torch), 3 layers" in printed


def weight_without_one(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return norm._norm(x) * norm.weight


def one_added_in_bf16(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return norm._norm(x) * (1 + norm.weight.bfloat16())


def another_epsilon(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (1 + norm.weight)


def quick_gelu(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    gate = mlp.gate_proj(x)
    return mlp.down_proj(gate * torch.sigmoid(1.702 * gate) * mlp.up_proj(x))


def halves_swapped(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x))


MISTAKES = {
    "Gemma3RMSNorm": (weight_without_one, one_added_in_bf16, another_epsilon),
    "Gemma3MLP": (quick_gelu, halves_swapped),
}


def test_a_mistake_in_an_operator_shows_in_the_logprobs(
    gemma3: Path, gemma3_prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' model in fp32, as another correct evaluation, and with mistakes planted in it."""
    from transformers import Gemma3ForCausalLM
    from transformers.models.gemma3 import modeling_gemma3

    model = Gemma3ForCausalLM.from_pretrained(gemma3, dtype=torch.float32)

    def worst() -> float:
        return max(off_by(evaluated(model, prompt.tokens), prompt.exact, prompt.bounds) for prompt in gemma3_prompts)

    assert worst() <= 0.5
    found: dict[str, float] = {}
    for name, mistakes in MISTAKES.items():
        for mistake in mistakes:
            with monkeypatch.context() as patch:
                patch.setattr(getattr(modeling_gemma3, name), "forward", mistake)
                found[mistake.__name__] = worst()
    assert all(off > 1 for off in found.values()), found


def evaluated(model: Callable[..., Any], tokens: list[int]) -> list[float]:
    """The logprob of each token but the first."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1)).squeeze(-1).tolist()
