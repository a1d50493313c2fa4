# SPDX-License-Identifier: Apache-2.0
"""The real SGLang server on a hybrid of Qwen3.5's kind: linear attention by the gated delta rule, and full attention.

SGLang alone serves such a model on a plain CPU up to its first forward pass, which ends at the first of the Triton kernels that have
no other form: "0 active drivers". Four functions are operators of sglang-fl's; the other kernels run in plain PyTorch. The server has no
flags but those of every test. What it is held against is the model in float64.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_functions import reference

from sglang_fl.cli.demo_model import RECITAL
from sglang_fl.dispatch.catalog import FUNCTIONS

from .conftest import Prompt, Running, off_by, serving
from .hybrid_model import hybrid_model, make_prompts

pytestmark = pytest.mark.e2e

CHUNK, PACKED, _, *CONVOLUTIONS = FUNCTIONS
_OPS = "sglang.kernels.ops"
#: SGLang's kernels that the model reaches beside them.
KERNELS = (
    f"{_OPS}.attention.fla.layernorm_gated:rms_norm_gated",
    f"{_OPS}.attention.linear.fused_gdn_gating:fused_gdn_gating",
    f"{_OPS}.attention.triton_gdn_fused_proj:fused_qkvzba_split_reshape_cat_contiguous",
    f"{_OPS}.elementwise.elementwise:fused_sigmoid_mul",
)
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hybrid() -> Path:
    if torch.accelerator.is_available():
        pytest.skip("these tests are for a plain CPU; make test-gpu serves on a GPU")
    return hybrid_model()


@pytest.fixture(scope="module")
def hybrid_prompts(hybrid: Path) -> list[Prompt]:
    return make_prompts(hybrid, torch.float32)


@pytest.fixture(scope="module")
def running(hybrid: Path, hybrid_prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hybrid")
    path = os.pathsep.join([str(TESTS), str(TESTS / "e2e"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {"PYTHONPATH": path, "SGLANG_MAMBA_CONV_DTYPE": "float32"}
    environ |= {"SGLANG_FL_PREFER": "vendor", "SGLANG_FL_PLUGIN_MODULES": "field_backend"}
    with serving(hybrid, folder, environ=environ) as found:
        yield found


def test_the_recital_is_exact(running: Running) -> None:
    answer = running.recite().json()
    assert answer["choices"][0]["message"]["content"] == RECITAL
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_logprobs_are_within_what_rounding_to_fp32_may_cost(running: Running, hybrid_prompts: list[Prompt]) -> None:
    for prompt in hybrid_prompts:
        assert off_by(running.logprobs(prompt), prompt.exact, prompt.bounds) <= 0.5


def test_several_at_once_do_not_see_each_others_states(running: Running) -> None:
    beginning = RECITAL[:60]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: running.recite(max_tokens=30).json()["choices"][0]["message"]["content"], range(3)))
    assert all(answer.startswith(beginning) and RECITAL.startswith(answer) for answer in answers), answers


def test_both_functions_ran_on_a_backend_with_flagos_signatures(running: Running) -> None:
    told = {line for line in running.dispatched() if "gated_delta_rule" in line}
    assert told == {
        f"{CHUNK} → vendor(vendor.field)",
        f"{PACKED} → vendor(vendor.field)",
    }
    printed = running.server.log.read_text()
    assert f"{CHUNK} → vendor(vendor.field)" in printed
    assert "Applied 1 hook(s) to sglang.kernels.ops.attention.fla.chunk.chunk_gated_delta_rule (from: plugin=sglang_fl" in printed


def test_the_other_kernels_ran_in_plain_pytorch(running: Running) -> None:
    assert running.dispatched() >= {f"{function} → reference(reference.torch)" for function in CONVOLUTIONS}
    told = {line for line in running.dispatched() if line.startswith("sglang.")}
    assert told == {f"{kernel} → reference(reference.torch)" for kernel in KERNELS}


MISTAKES: dict[str, Callable[..., dict[str, Any]]] = {
    "no decay": lambda **x: {**x, "g": torch.zeros_like(x["g"])},
    "decay is a fifth off": lambda **x: {**x, "g": x["g"] * 0.8},
    "beta in bf16": lambda **x: {**x, "beta": x["beta"].bfloat16().float()},
    "q, k and v in bf16": lambda **x: {**x, **{name: x[name].bfloat16().float() for name in "qkv"}},
    "no norm": lambda **x: {**x, "l2norm": False},
    "heads of q turned": lambda **x: {**x, "q": x["q"].flip(2)},
}


def test_a_mistake_in_the_operator_shows_in_the_logprobs(
    hybrid: Path, hybrid_prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' model in fp32 with the reference in the place of its own gated delta rule, and with mistakes in that."""
    from transformers import Qwen3_5ForCausalLM
    from transformers.models.qwen3_5 import modeling_qwen3_5

    model = Qwen3_5ForCausalLM.from_pretrained(hybrid, dtype=torch.float32, attn_implementation="eager")
    mistake = ""

    def chunk(q: Any, k: Any, v: Any, *, g: Any, beta: Any, **_: Any) -> Any:
        x = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "l2norm": True}
        x = MISTAKES[mistake](**x) if mistake else x
        norm = x.pop("l2norm")
        return reference.chunk_gated_delta_rule(**x, use_qk_l2norm_in_kernel=norm)[0], None

    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", chunk)

    def worst() -> float:
        found = []
        for prompt in hybrid_prompts:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt.tokens]), use_cache=False).logits[0]
            wanted = torch.tensor(prompt.tokens[1:]).unsqueeze(-1)
            logprobs = logits[:-1].double().log_softmax(-1).gather(-1, wanted).squeeze(-1).tolist()
            found.append(off_by(logprobs, prompt.exact, prompt.bounds))
        return max(found)

    assert worst() <= 0.5
    shown = {}
    for mistake in MISTAKES:
        shown[mistake] = worst()
    assert all(value > 1 for value in shown.values()), shown
