# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: real servers of a small Gemma 3 with SGLang's default graphs, one for each way to run."""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch
from e2e.conftest import Prompt, Running, make_prompts
from e2e.gemma3_model import gemma3_model
from served_on_gpu import FLAGOS, Way, check_logprobs, check_the_recital, side_by_side

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

OPERATORS = ("gelu_and_mul", "gemma_rms_norm", "rotary_embedding")
#: SGLang's Gemma 3 rotates by itself, and never calls the rotary embeddings that it makes.
ROTARY = "RotaryEmbedding → sglang(not called: model.layers.*.self_attn.rotary_emb)"


def _way(destination: str, kind: str, **environ: str) -> Way:
    return Way(destination, {"SGLANG_FL_PER_OP": ";".join(f"{op}={kind}" for op in OPERATORS), **environ})


WAYS = {
    "sglang": _way("sglang(policy)", "sglang", USE_FLAGGEMS="0"),
    "flagos": _way("flagos(default.flagos)", "flagos", SGLANG_FL_STRICT="1", **FLAGOS),
    "triton": _way("triton(triton.sglang_fl)", "triton", SGLANG_FL_STRICT="1"),
    "vendor": _way("vendor(vendor.cuda)", "vendor", SGLANG_FL_STRICT="1"),
    "reference": _way("reference(reference.torch)", "reference"),
}


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return make_prompts(gemma3_model(), torch.bfloat16)


@pytest.fixture(scope="module")
def servers(prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Running]]]:
    with side_by_side(gemma3_model(), WAYS, "bfloat16", tmp_path_factory) as found:
        yield found


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_exact_and_where_it_should(servers: dict[str, Future[Running]], way: str, prompts: list[Prompt]) -> None:
    running = servers[way].result()
    check_the_recital(running)
    check_logprobs(running, way, prompts)
    destination = WAYS[way].destination
    rotary = f"RotaryEmbedding → {destination}" if way == "sglang" else ROTARY
    assert running.dispatched() == {f"Gemma3RMSNorm → {destination}", f"GeluAndMul → {destination}", rotary}
