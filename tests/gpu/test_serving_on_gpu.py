# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: real servers with SGLang's default prefill and decode graphs, one for each way to run."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from e2e.conftest import Prompt, Running, make_prompts
from served_on_gpu import FLAGOS, Way, check_logprobs, check_the_recital, side_by_side

from sglang_fl.cli.demo_model import demo_model
from sglang_fl.config import load_settings
from sglang_fl.device import Device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

CLASSES = {"RMSNorm": "rms_norm", "RotaryEmbedding": "rotary_embedding", "SiluAndMul": "silu_and_mul"}
KINDS = {
    "flagos": "flagos(default.flagos)",
    "triton": "triton(triton.sglang_fl)",
    "vendor": "vendor(vendor.cuda)",
    "sglang": "sglang(policy)",
}
#: Qwen3's query and key norms, which SGLang computes with one kernel of its own on CUDA.
FUSED = "RMSNorm → sglang(not called: model.layers.*.self_attn.k_norm model.layers.*.self_attn.q_norm)"


SGLANG = {"USE_FLAGGEMS": "0", "SGLANG_FL_PER_OP": ";".join(f"{op}=sglang" for op in CLASSES.values())}
COMPILE = ("--enable-torch-compile", "--torch-compile-max-bs", "2")
WAYS = {
    "sglang": Way("sglang(policy)", SGLANG),
    "profile": Way("profile"),
    "flagos": Way("profile", {**FLAGOS, "SGLANG_FLAGGEMS_RECORD": "1"}),
    "vendor": Way("vendor(vendor.cuda)", {"SGLANG_FL_PREFER": "vendor", "SGLANG_FL_STRICT": "1"}),
    "reference": Way("reference(reference.torch)", {"SGLANG_FL_PREFER": "reference"}),
    "compiled": Way("profile", FLAGOS, COMPILE),
}


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return make_prompts(demo_model(), torch.bfloat16)


@pytest.fixture(scope="module")
def servers(prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Running]]]:
    # After the prompts, whose bounds take seconds alone, and minutes beside servers that keep the cores busy.
    model = demo_model()
    with side_by_side(model, WAYS, "bfloat16", tmp_path_factory) as found:
        yield found


@pytest.fixture(params=WAYS, scope="module")
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def running(servers: dict[str, Future[Running]], way: str) -> Running:
    return servers[way].result()


def test_the_recital_is_exact(running: Running) -> None:
    check_the_recital(running)


def test_logprobs_are_within_what_rounding_to_bf16_may_cost(running: Running, way: str, prompts: list[Prompt]) -> None:
    check_logprobs(running, way, prompts)


def test_every_layer_ran_where_it_should(running: Running, way: str) -> None:
    destination = WAYS[way].destination
    if destination == "profile":
        settings = load_settings(WAYS[way].environ, device=Device("nvidia", "cuda", "cuda", "a test"))
        orders = dict(settings.op_backends)
        expected = {f"{name} → {KINDS[orders[op][0] if op in orders else str(settings.prefer)]}" for name, op in CLASSES.items()}
    else:
        expected = {f"{name} → {destination}" for name in CLASSES}
    if "RMSNorm → sglang(policy)" not in expected:
        expected.add(FUSED)
    assert running.dispatched() == expected
    printed = running.server.log.read_text()
    assert ("6 bound RMSNorm layers were never called" in printed) is (FUSED in expected)
    assert "capture" in printed.lower()


def test_layer_1_is_on_where_everything_is_flagos(running: Running, way: str) -> None:
    printed = running.server.log.read_text()
    if way in ("flagos", "compiled"):
        assert "FlagGems replaces 4" in printed and "functions in graphs" in printed
        assert (": aten::" in printed) is (way == "flagos"), "the operators that ran are on record"
    elif way == "sglang":
        assert "no ATen operator is replaced: USE_FLAGGEMS=0" in printed


@pytest.mark.parametrize("left", ["sglang", "profile"])
def test_no_code_of_the_plugin_runs_in_a_step_that_is_left_to_sglang(
    servers: dict[str, Future[Running]], left: str, tmp_path: Path
) -> None:
    functions = servers[left].result().python_functions(tmp_path)
    assert any("managers/scheduler.py" in name for name in functions)
    assert not [name for name in functions if "sglang_fl" in name]


def test_flaggems_runs_in_graphs_alone(servers: dict[str, Future[Running]], tmp_path: Path) -> None:
    """What Python calls in a step, prefill and sampling included, has nothing of FlagGems: it is in the graphs that replay."""
    functions = servers["flagos"].result().python_functions(tmp_path)
    assert any("managers/scheduler.py" in name for name in functions)
    assert not [name for name in functions if "flag_gems" in name]


def test_torch_compile_is_told_of(running: Running, way: str) -> None:
    printed = running.server.log.read_text()
    assert ("with --enable-torch-compile SGLang compiles its own" in printed) is (way == "compiled")
