# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: real servers of a small Gemma 3 with SGLang's default graphs, one for each way to run."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from e2e.conftest import Prompt, Running, make_prompts, off_by, serving
from e2e.gemma3_model import gemma3_model

from sglang_fl.cli.demo_model import RECITAL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

OPERATORS = ("gelu_and_mul", "gemma_rms_norm", "rotary_embedding")
#: SGLang's Gemma 3 rotates by itself, and never calls the rotary embeddings that it makes.
ROTARY = "RotaryEmbedding → sglang(not called: model.layers.*.self_attn.rotary_emb)"
#: way to run -> where its layers then ran, and its variables.
WAYS = {
    "sglang": ("sglang(policy)", {"USE_FLAGGEMS": "0", "SGLANG_FL_PER_OP": ";".join(f"{op}=sglang" for op in OPERATORS)}),
    "flagos": ("flagos(default.flagos)", {"SGLANG_FL_PREFER": "flagos", "SGLANG_FL_STRICT": "1"}),
    "vendor": ("vendor(vendor.cuda)", {"SGLANG_FL_PREFER": "vendor", "SGLANG_FL_STRICT": "1"}),
    "reference": ("reference(reference.torch)", {"SGLANG_FL_PREFER": "reference"}),
}


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return make_prompts(gemma3_model(), torch.bfloat16)


@pytest.fixture(scope="module")
def servers(prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Running]]]:
    model = gemma3_model()
    tmp_path_factory.getbasetemp()  # made by one thread, not by several at once
    with ExitStack() as stack, ThreadPoolExecutor(len(WAYS)) as pool:

        def start(name: str) -> Running:
            share = ("--max-total-tokens", "16384", "--mem-fraction-static", "0.9")
            return stack.enter_context(serving(model, tmp_path_factory.mktemp(name), *share, dtype="bfloat16", environ=WAYS[name][1]))

        yield {name: pool.submit(start, name) for name in WAYS}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_exact_and_where_it_should(servers: dict[str, Future[Running]], way: str, prompts: list[Prompt]) -> None:
    running = servers[way].result()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: running.recite().json()["choices"][0]["message"]["content"], range(16)))
    assert answers == [RECITAL] * 16
    worst = max(off_by(running.logprobs(prompt), prompt.exact, prompt.bounds) for prompt in prompts)
    print(f"{way}: logprobs are off by {worst:.3f} of what rounding to bf16 may cost two runs")
    assert worst <= 0.5
    destination = WAYS[way][0]
    rotary = f"RotaryEmbedding → {destination}" if way == "sglang" else ROTARY
    assert running.dispatched() == {f"Gemma3RMSNorm → {destination}", f"GeluAndMul → {destination}", rotary}
