# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: real servers on a hybrid model of Qwen3.5's kind, with SGLang's default graphs; one for each way to run."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from e2e.conftest import Prompt, Running, off_by, serving
from e2e.hybrid_model import hybrid_model, make_prompts

from sglang_fl.cli.demo_model import RECITAL
from sglang_fl.dispatch.bridge.catalog import FUNCTIONS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

CHUNK, RECURRENT, PACKED = FUNCTIONS
# SGLang keeps the convolution's states in bf16, and fails where it has to write fp16 there.
_FP16_STATES = {"SGLANG_MAMBA_CONV_DTYPE": "float16"}
_LEFT = {"USE_FLAGGEMS": "0", "SGLANG_FL_PER_OP": ";".join(f"{op}=sglang" for op in FUNCTIONS)}
_OURS = ";".join
#: The functions' implementation, and the settings that bring it about; all else is SGLang's.
WAYS: dict[str, tuple[str, Mapping[str, str]]] = {
    "sglang": ("sglang(policy)", _LEFT),
    "flagos": ("flagos(default.flagos)", {"SGLANG_FL_STRICT": "1", "SGLANG_FL_PER_OP": _OURS(f"{op}=flagos" for op in FUNCTIONS)}),
    "vendor": ("vendor(vendor.cuda)", {"SGLANG_FL_STRICT": "1", "SGLANG_FL_PER_OP": _OURS(f"{op}=vendor" for op in FUNCTIONS)}),
    "reference": ("reference(reference.torch)", {"SGLANG_FL_PER_OP": _OURS(f"{op}=reference" for op in FUNCTIONS)}),
}


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return make_prompts(hybrid_model(), torch.float16)


@pytest.fixture(scope="module")
def servers(prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Running]]]:
    model = hybrid_model()
    tmp_path_factory.getbasetemp()  # made by one thread, not by several at once
    with ExitStack() as stack, ThreadPoolExecutor(len(WAYS)) as pool:

        def start(name: str, environ: Mapping[str, str]) -> Running:
            share = ("--max-total-tokens", "16384", "--max-mamba-cache-size", "64", "--mem-fraction-static", "0.9")
            server = serving(model, tmp_path_factory.mktemp(name), *share, dtype="float16", environ={**_FP16_STATES, **environ})
            return stack.enter_context(server)

        yield {name: pool.submit(start, name, environ) for name, (_, environ) in WAYS.items()}


@pytest.fixture(params=WAYS, scope="module")
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def running(servers: dict[str, Future[Running]], way: str) -> Running:
    return servers[way].result()


def test_the_recital_is_exact(running: Running) -> None:
    assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL


def test_sixteen_at_once_are_all_exact(running: Running) -> None:
    """In one batch, padded to a graph's size; and by prefixes that are cached with their states."""
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: running.recite().json()["choices"][0]["message"]["content"], range(16)))
    assert answers == [RECITAL] * 16


def test_logprobs_are_within_what_rounding_to_fp16_may_cost(running: Running, way: str, prompts: list[Prompt]) -> None:
    worst = max(off_by(running.logprobs(prompt), prompt.exact, prompt.bounds) for prompt in prompts)
    print(f"{way}: logprobs are off by {worst:.3f} of what rounding to fp16 may cost two runs")
    assert worst <= 0.5


def test_both_functions_ran_where_they_should(running: Running, way: str) -> None:
    destination = WAYS[way][0]
    told = {line for line in running.dispatched() if "gated_delta_rule" in line}
    assert {f"{CHUNK} → {destination}", f"{PACKED} → {destination}"} <= told
    assert not [line for line in told if "not called: " in line], "heads of 32 are none that FlashInfer's kernel takes"
    printed = running.server.log.read_text()
    assert ("Applied 1 hook(s)" in printed and CHUNK in printed) is (way != "sglang")
    assert "capture" in printed.lower()
