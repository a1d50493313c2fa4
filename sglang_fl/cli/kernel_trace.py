# SPDX-License-Identifier: Apache-2.0
"""Serve a model once, count SGLang's kernels that it calls, and save the counts under the model's name."""

import datetime
import hashlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from rich.console import Console

from ..compat import installed_version
from ..config import SettingsError
from ..device import probe
from ..kernels import trace
from ..platform.absent_packages import server_module
from ..utils.folders import user_folder
from ..utils.server import Server, ServerFailed, free_port
from .model_layers import read_config

_WEIGHTS, _TOKENIZERS = ("*.safetensors", "*.bin", "*.pt"), ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
#: In which the processes write their last counts.
_SECONDS_FOR_COUNTS = 3 * trace.SECONDS_BETWEEN_WRITES
_SECONDS_TO_ANSWER = 600
_SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "frequency_penalty": 0.2}


def read_record(model: Path) -> dict[str, Any]:
    """The last result of :func:`trace_model`.

    Raises:
        SettingsError: the model was not traced yet, or is not a model.
    """
    file = _file(model)
    if not file.exists():
        read_config(model)  # raises an error if the folder is not a model
        raise SettingsError(f"--model: {str(model)!r} was not traced yet: run sglang-fl kernels --model {model} --trace")
    return json.loads(file.read_text(encoding="utf-8"))


def trace_model(model: Path, arguments: Sequence[str]) -> bool:
    """Serve a model with these server arguments, send requests, and save the counts. Returns whether it answered.

    A model without weights gets random ones, as with SGLang's ``--load-format dummy``.

    Raises:
        SettingsError: there is no such model.
    """
    config = read_config(model)
    vocabulary = int((config.get("text_config") or config).get("vocab_size") or 1000)
    given = [] if _has(model, _WEIGHTS) else ["--load-format", "dummy"]
    given += [] if _has(model, _TOKENIZERS) else ["--skip-tokenizer-init"]
    folder = Path(tempfile.mkdtemp(prefix="sglang-fl-kernels-"))
    device = probe()
    server = Server(
        model,
        port=free_port(),
        log=folder / "server.log",
        arguments=[*given, *arguments],
        environ={trace.VARIABLE: str(folder)},
        command=(server_module(device),),
    )
    console, failed = Console(stderr=True, markup=False, emoji=False), ""
    try:
        with server, console.status(f"serving {model}"):
            server.wait_until_ready()
            _ask(server, vocabulary)
            time.sleep(_SECONDS_FOR_COUNTS)
    except (ServerFailed, requests.RequestException) as error:
        failed = f"{type(error).__name__}: {error}"
        console.print(f"The server failed: {server.last_lines()}\nIts log: {server.log}", soft_wrap=True)
    record = {
        "model": str(model.resolve()),
        "device": device.vendor,
        "sglang": installed_version(),
        "date": datetime.date.today().isoformat(),
        "arguments": list(arguments),
        "failed": failed,
        "counts": trace.total(folder),
    }
    file = _file(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    if not failed:
        shutil.rmtree(folder)
    return not failed


def _has(model: Path, patterns: Sequence[str]) -> bool:
    return any(True for pattern in patterns for _ in model.glob(pattern))


def _ask(server: Server, vocabulary: int) -> None:
    """Send requests: one prompt twice, to use the prefix cache; several at once, sampled; all with logprobs."""
    draw = random.Random(0)

    def answer(tokens: list[int], sampling: dict[str, float]) -> None:
        asked: dict[str, Any] = {"input_ids": tokens, "sampling_params": {"max_new_tokens": 8, "ignore_eos": True, **sampling}}
        asked |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
        requests.post(f"{server.url}/generate", json=asked, timeout=_SECONDS_TO_ANSWER).raise_for_status()

    def prompt(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    first = prompt(40)
    answer(first, {"temperature": 0})
    answer([*first, *prompt(3)], {"temperature": 0})
    with ThreadPoolExecutor() as pool:
        list(pool.map(answer, map(prompt, (7, 8, 9)), [_SAMPLED, _SAMPLED, {**_SAMPLED, "sampling_seed": 1}]))


def _file(model: Path) -> Path:
    path = model.resolve()
    name = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}.json"
    return user_folder("state", "the counts of kernels") / "kernels" / name
