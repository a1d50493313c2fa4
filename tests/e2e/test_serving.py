# SPDX-License-Identifier: Apache-2.0
"""The real SGLang server with the plugin's defaults on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import requests

from sglang_fl.cli.demo_model import RECITAL
from sglang_fl.fingerprint import compare, read
from sglang_fl.fingerprint.compare import MARK

from .conftest import Native, Prompt, Running, off_by, serving

pytestmark = pytest.mark.e2e

BOUND = {"RMSNorm → reference(reference.torch)", "SiluAndMul → reference(reference.torch)", "RotaryEmbedding → reference(reference.torch)"}


@pytest.fixture(scope="module")
def running(model: Path, native_logprobs: list[list[float]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(model, tmp_path_factory.mktemp("serving"), "--enable-metrics", environ={"SGLANG_FL_PREFER": "reference"}) as found:
        yield found


def test_the_recital_is_exact(running: Running) -> None:
    answer = running.recite().json()
    assert answer["choices"][0]["message"]["content"] == RECITAL
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_the_streamed_recital_is_exact(running: Running) -> None:
    lines = [line.removeprefix(b"data: ") for line in running.recite(stream=True).iter_lines() if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    deltas = [choice["delta"].get("content") or "" for line in lines[:-1] for choice in json.loads(line)["choices"]]
    assert len([delta for delta in deltas if delta]) > 10
    assert "".join(deltas) == RECITAL


def test_sixteen_at_once_are_all_exact(running: Running) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: running.recite().json()["choices"][0]["message"]["content"], range(16)))
    assert answers == [RECITAL] * 16


def test_the_example_of_a_client_gets_all_its_answers(running: Running) -> None:
    example = Path(__file__).parents[2] / "examples" / "openai_client.py"
    done = subprocess.run([sys.executable, str(example), running.server.url], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{RECITAL}\n8 requests at once, 1 different answer(s)\n"


def test_requests_that_a_plain_cpu_cannot_answer_do_not_end_the_server(running: Running) -> None:
    asked = (
        ("release_memory_occupation", {}, "cannot release and resume memory"),
        ("resume_memory_occupation", {}, "cannot release and resume memory"),
        ("start_profile", {"activities": ["MEM"]}, ""),
        ("start_profile", {"activities": ["CUDA_PROFILER"]}, ""),
    )
    for path, body, message in asked:
        answer = requests.post(f"{running.server.url}/{path}", json=body, timeout=60)
        assert answer.status_code >= 400 and message in answer.text
    assert running.recite(max_tokens=4).json()["choices"][0]["finish_reason"] == "length"


def test_every_layer_ran_through_the_dispatch(running: Running) -> None:
    assert running.dispatched() == BOUND
    assert running.dispatch_log.read_text().splitlines()[0].endswith(": Qwen3ForCausalLM"), "which process of which server they are of"


def test_the_servers_log_has_one_summary(running: Running) -> None:
    printed = running.server.log.read_text()
    assert printed.count("layers bound") == 1
    assert "sglang-fl: 17 layers bound, 0 left to SGLang" in printed
    assert "rms_norm           RMSNorm                      → reference(reference.torch), 13 layers" in printed


def test_the_log_and_the_metrics_say_what_runs(running: Running, tmp_path: Path) -> None:
    (info,) = running.info()
    (line,) = [line for line in running.server.log.read_text().splitlines() if MARK in line]
    assert f"{MARK}{info['fingerprint']} of Qwen3ForCausalLM: " in line
    assert info["model"] == "Qwen3ForCausalLM" and info["profile"] == "cpu" and info["sglang"] == version("sglang")
    assert info["bindings"] == ", ".join(f"{op}=reference(reference.torch)" for op in ("rms_norm", "rotary_embedding", "silu_and_mul"))
    asked = [sys.executable, "-m", "sglang_fl", "ops", "--json"]
    environ = {**os.environ, "SGLANG_FL_PREFER": "reference", "SGLANG_FL_DISPATCH_LOG": str(running.dispatch_log)}
    here = tmp_path / "here.json"
    here.write_text(subprocess.run(asked, env=environ, check=True, capture_output=True, text=True).stdout)
    assert compare(read(running.server.log), read(here)) == [], "the command line says the same without a server"


def test_no_code_of_the_plugin_runs_in_a_step_that_is_left_to_sglang(native: Native, running: Running, tmp_path: Path) -> None:
    """So what serving costs then is SGLang's own; a server with bound layers shows that such code would be seen."""
    bound = running.python_functions(tmp_path)
    for functions in (native.python_functions, bound):
        assert any("managers/scheduler.py" in name for name in functions) and any("models/qwen3.py" in name for name in functions)
    assert any("sglang_fl/dispatch/bridge/norm.py" in name for name in bound)
    assert not [name for name in native.python_functions if "sglang_fl" in name]


def test_logprobs_agree_with_sglangs_own(running: Running, prompts: list[Prompt], native_logprobs: list[list[float]]) -> None:
    for prompt, native in zip(prompts, native_logprobs, strict=True):
        got = running.logprobs(prompt)
        assert off_by(got, native, prompt.bounds) <= 1
        assert off_by(got, prompt.exact, prompt.bounds) <= 0.5
