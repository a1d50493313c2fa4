# SPDX-License-Identifier: Apache-2.0
"""Real SGLang servers on the demo model. A start costs most of a minute: each is shared by a module.

Only one is up at a time, since an idle one keeps a core busy: a fixture that serves asks for
``native_logprobs`` first, whose server has ended by then.
"""

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from prometheus_client.parser import text_string_to_metric_families

from sglang_fl.cli.demo_model import QUESTION, RECITAL, demo_model
from sglang_fl.dispatch.logger_manager import read_dispatch_log
from sglang_fl.utils.server import Server, free_port

from .forward_error import logprobs_and_bounds


@pytest.fixture(scope="session")
def model() -> Path:
    if torch.accelerator.is_available():
        pytest.skip("these tests are for a plain CPU; make test-gpu serves on a GPU")
    return demo_model()


@dataclass(frozen=True)
class Prompt:
    """Tokens to score, the exact logprobs of all but the first, and what the dtype may be off by."""

    tokens: list[int]
    exact: list[float]
    bounds: list[float]


def make_prompts(model: Path, dtype: torch.dtype) -> list[Prompt]:
    """The recited text, of which the model is sure, and tokens at random, of which it is not."""
    from transformers import AutoTokenizer

    recital = AutoTokenizer.from_pretrained(model)(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{RECITAL}").input_ids
    random = torch.randint(3, 490, (48,), generator=torch.Generator().manual_seed(4)).tolist()
    return [Prompt(tokens, *logprobs_and_bounds(model, tokens, dtype)) for tokens in (recital[:96], random)]


@pytest.fixture(scope="session")
def prompts(model: Path) -> list[Prompt]:
    return make_prompts(model, torch.float32)


@dataclass
class Running:
    """A server that is up, and what it writes."""

    server: Server
    dispatch_log: Path

    def dispatched(self) -> set[str]:
        """The dispatch log's lines, without what is the same in all of them."""
        return {f"{name} → {destination}" for name, destination in read_dispatch_log(self.dispatch_log.read_text())}

    def logprobs(self, prompt: Prompt) -> list[float]:
        """The logprob of each token of the prompt but the first."""
        sampling = {"temperature": 0, "max_new_tokens": 1}
        asked = {"input_ids": prompt.tokens, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        answer = requests.post(f"{self.server.url}/generate", json=asked, timeout=120)
        answer.raise_for_status()
        found = answer.json()["meta_info"]["input_token_logprobs"]
        assert [token for _, token, *_ in found] == prompt.tokens
        return [logprob for logprob, *_ in found[1:]]

    def python_functions(self, directory: Path) -> set[str]:
        """The Python functions that run in the scheduler's process while a prompt is answered with 8 tokens, as ``file(line): name``.

        The server is idle at both ends, so whole steps are in it.
        """
        what = {"output_dir": str(directory), "activities": ["CPU"], "with_stack": True, "record_shapes": False, "profile_id": "python"}
        prompt = {"text": QUESTION, "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}
        for path, asked in (("start_profile", what), ("generate", prompt), ("stop_profile", {})):
            requests.post(f"{self.server.url}/{path}", json=asked, timeout=300).raise_for_status()
        (trace,) = directory.glob("python*.trace.json.gz")
        with gzip.open(trace) as file:
            return {event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "python_function"}

    def info(self) -> list[dict[str, str]]:
        """The labels of sglang-fl's metric, of each sample in the server's /metrics."""
        answer = requests.get(f"{self.server.url}/metrics", timeout=60)
        answer.raise_for_status()
        samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
        found = [sample for sample in samples if sample.name == "sglang_fl_info"]
        assert all(sample.value == 1 for sample in found)
        return [sample.labels for sample in found]

    def recite(self, **more: object) -> requests.Response:
        asked = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 400, **more}
        answer = requests.post(f"{self.server.url}/v1/chat/completions", json=asked, timeout=120, stream=bool(more.get("stream")))
        answer.raise_for_status()
        return answer


def off_by(got: Sequence[float], other: Sequence[float], bounds: Sequence[float]) -> float:
    """The largest difference of two runs' logprobs, in units of what two correct fp32 runs may differ by."""
    assert len(got) == len(other) == len(bounds)
    return max(abs(a - b) / (2 * bound) for a, b, bound in zip(got, other, bounds, strict=True))


@contextmanager
def serving(
    model: Path, directory: Path, *arguments: str, dtype: str = "float32", environ: Mapping[str, str] | None = None, **more: Any
) -> Iterator[Running]:
    """A server on the model, ready; in fp32, so that a wrong operator stands out from rounding."""
    dispatch_log = directory / "dispatch.log"
    environ = {"SGLANG_FL_DISPATCH_LOG": str(dispatch_log), "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **(environ or {})}
    server = Server(
        model, port=free_port(), log=directory / "server.log", arguments=["--dtype", dtype, *arguments], environ=environ, **more
    )
    with server:
        server.wait_until_ready()
        yield Running(server, dispatch_log)


@dataclass(frozen=True)
class Native:
    """What a server gave that leaves everything to SGLang."""

    logprobs: list[list[float]]
    python_functions: set[str]


@pytest.fixture(scope="session")
def native_logprobs(native: Native) -> list[list[float]]:
    return native.logprobs


@pytest.fixture(scope="session")
def native(model: Path, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Native:
    """A server that leaves everything to SGLang, and its dispatch log's word for that."""
    directory = tmp_path_factory.mktemp("native")
    with serving(model, directory, environ={"SGLANG_FL_OOT_ENABLED": "0"}) as running:
        found = [running.logprobs(prompt) for prompt in prompts]
        assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL
        assert running.dispatched() == {f"{name} → sglang(Layer 2 is off)" for name in ("RMSNorm", "SiluAndMul", "RotaryEmbedding")}
        functions = running.python_functions(directory)
    for logprobs, prompt in zip(found, prompts, strict=True):
        assert off_by(logprobs, prompt.exact, prompt.bounds) <= 0.5, "native SGLang itself is one correct evaluation"
    return Native(found, functions)
