# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: real servers on a hybrid model of Qwen3.5's kind, with SGLang's default graphs; one for each way to run."""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch
from e2e.conftest import Prompt, Running
from e2e.hybrid_model import hybrid_model, make_prompts
from served_on_gpu import SHARE, Way, check_logprobs, check_the_recital, side_by_side

from sglang_fl.dispatch.catalog import FUNCTIONS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

CHUNK, PACKED, _, CONVOLUTION, _ = FUNCTIONS
# SGLang keeps the convolution's states in bf16, and fails where it has to write fp16 there.
_FP16_STATES = {"SGLANG_MAMBA_CONV_DTYPE": "float16"}


def _way(destination: str, kind: str, **environ: str) -> Way:
    """The functions with one kind of implementation; all else is SGLang's."""
    return Way(destination, {**_FP16_STATES, "SGLANG_FL_PER_OP": ";".join(f"{op}={kind}" for op in (CHUNK, PACKED)), **environ})


WAYS = {
    "sglang": _way("sglang(policy)", "sglang", USE_FLAGGEMS="0"),
    "flagos": _way("flagos(default.flagos)", "flagos", SGLANG_FL_STRICT="1"),
    "vendor": _way("vendor(vendor.cuda)", "vendor", SGLANG_FL_STRICT="1"),
    "reference": _way("reference(reference.torch)", "reference"),
    "all of vendor's": Way("vendor(vendor.cuda)", {**_FP16_STATES, "SGLANG_FL_PER_OP": ";".join(f"{op}=vendor" for op in FUNCTIONS)}),
}


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return make_prompts(hybrid_model(), torch.float16)


@pytest.fixture(scope="module")
def servers(prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Running]]]:
    share = (*SHARE, "--max-mamba-cache-size", "64")
    with side_by_side(hybrid_model(), WAYS, "float16", tmp_path_factory, share) as found:
        yield found


@pytest.fixture(params=WAYS, scope="module")
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def running(servers: dict[str, Future[Running]], way: str) -> Running:
    return servers[way].result()


def test_the_recital_is_exact(running: Running) -> None:
    """In a batch prefixes are cached with their states, too."""
    check_the_recital(running)


def test_logprobs_are_within_what_rounding_to_fp16_may_cost(running: Running, way: str, prompts: list[Prompt]) -> None:
    check_logprobs(running, way, prompts)


def test_both_functions_ran_where_they_should(running: Running, way: str) -> None:
    destination = WAYS[way].destination
    told = {line for line in running.dispatched() if "gated_delta_rule" in line}
    if way == "all of vendor's":
        assert f"{CONVOLUTION} → {destination}" in running.dispatched()
    assert {f"{CHUNK} → {destination}", f"{PACKED} → {destination}"} <= told
    assert not [line for line in told if "not called: " in line], "heads of 32 are none that FlashInfer's kernel takes"
    printed = running.server.log.read_text()
    assert ("Applied 1 hook(s)" in printed and CHUNK in printed) is (way != "sglang")
    assert "capture" in printed.lower()
