# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE on the real SGLang server: a router and experts in each layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch

from sglang_fl.cli.demo_model import QUESTION, RECITAL

from .conftest import Prompt, Running, off_by, serving
from .forward_error import OnTheEdge, logprobs_and_bounds
from .planted_moe_mistakes import MISTAKES
from .qwen3_moe_model import qwen3_moe_model

pytestmark = pytest.mark.e2e

CLASSES = ("RMSNorm", "RotaryEmbedding", "TopK", "UnquantizedFusedMoEMethod")


@pytest.fixture(scope="module")
def qwen3_moe() -> Path:
    if torch.accelerator.is_available():
        pytest.skip("these tests are for a plain CPU; make test-gpu serves on a GPU")
    return qwen3_moe_model()


def settled(model: Path, tokens: list[int]) -> Prompt:
    """As many of the tokens as rounding cannot route another way."""
    while True:
        try:
            return Prompt(tokens, *logprobs_and_bounds(model, tokens))
        except OnTheEdge as edge:
            tokens = tokens[: edge.position]


@pytest.fixture(scope="module")
def moe_prompts(qwen3_moe: Path) -> list[Prompt]:
    """The recited text, of which the model is sure, and tokens at random, of which it is not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen3_moe)
    recital = tokenizer(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{RECITAL}").input_ids
    rng = torch.Generator().manual_seed(4)
    random = (settled(qwen3_moe, torch.randint(3, 490, (32,), generator=rng).tolist()) for _ in range(40))
    prompts = [settled(qwen3_moe, recital[:64]), *islice((prompt for prompt in random if len(prompt.tokens) >= 20), 4)]
    assert len(prompts) == 5
    print("tokens:", *(len(prompt.tokens) for prompt in prompts))
    return prompts


@dataclass
class Planted(Running):
    """A server whose reference makes the mistake that ``chosen`` holds."""

    chosen: Path


@pytest.fixture(scope="module")
def running(qwen3_moe: Path, moe_prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    directory = tmp_path_factory.mktemp("moe")
    chosen = directory / "mistake"
    chosen.write_text("none")
    environ = {
        "SGLANG_FL_PREFER": "vendor",
        "SGLANG_FL_STRICT": "1",
        "SGLANG_FL_PLUGIN_MODULES": "planted_moe_mistakes,field_backend",
        "PLANTED_MISTAKE": str(chosen),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    with serving(qwen3_moe, directory, "--disable-radix-cache", environ=environ) as found:
        yield Planted(found.server, found.dispatch_log, chosen)


def test_the_recital_is_exact(running: Planted) -> None:
    answer = running.recite().json()
    assert answer["choices"][0]["message"]["content"] == RECITAL
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_every_layer_ran_through_the_dispatch(running: Planted) -> None:
    assert running.dispatched() == {f"{name} → vendor(vendor.field)" for name in CLASSES}
    printed = running.server.log.read_text()
    assert "sglang-fl: 14 layers bound, 0 left to SGLang" in printed
    assert "topk               TopK                         → vendor(vendor.field), 2 layers" in printed
    assert "fused_moe          UnquantizedFusedMoEMethod    → vendor(vendor.field), 2 layers" in printed


def test_logprobs_are_within_what_rounding_to_fp32_may_cost(running: Planted, moe_prompts: list[Prompt]) -> None:
    for prompt in moe_prompts:
        assert off_by(running.logprobs(prompt), prompt.exact, prompt.bounds) <= 0.5


def test_planted_mistakes_break_the_logprobs(running: Planted, moe_prompts: list[Prompt]) -> None:
    def worst() -> float:
        return max(off_by(running.logprobs(prompt), prompt.exact, prompt.bounds) for prompt in moe_prompts)

    found = {}
    for mistake in MISTAKES:
        running.chosen.write_text(mistake)
        found[mistake] = worst()
    running.chosen.write_text("none")
    print({mistake: round(off, 1) for mistake, off in found.items()})
    assert all(off > 0.5 for off in found.values()), found
    assert worst() <= 0.5
