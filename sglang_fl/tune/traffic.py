# SPDX-License-Identifier: Apache-2.0
"""The requests for recording a model: from a user's file, or a mix of typical serving."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import SettingsError

#: Batches: the arguments of ``sglang.Engine.generate`` for each.
Requests = Sequence[dict[str, Any]]

_KEYS = frozenset({"prompt", "input_ids", "input_len", "output_len", "sampling_params"})


def mix(vocabulary: int, longest: int, *, sampled: bool) -> Requests:
    """Prefill and decode, alone and in batches.

    Args:
        longest: the tokens of the longest prompt.
        sampled: also several kinds of random sampling, and logprobs. The first time, compiling their kernels takes up to two minutes.
    """
    rng = random.Random(0)

    def prompts(*lengths: int) -> list[list[int]]:
        return [[rng.randrange(3, vocabulary) for _ in range(max(1, min(length, longest)))] for length in lengths]

    greedy = {"temperature": 0.0, "max_new_tokens": 6, "ignore_eos": True}
    batches = [prompts(7), prompts(*range(20, 340, 40)), prompts(50, 60, 70, 80), prompts(longest)]
    found: list[dict[str, Any]] = [{"input_ids": batch, "sampling_params": greedy} for batch in batches]
    if sampled:
        plain = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "max_new_tokens": 6, "ignore_eos": True}
        mixed = [greedy, plain, plain | {"min_p": 0.05}, plain | {"frequency_penalty": 0.5, "presence_penalty": 0.5}]
        found[1]["sampling_params"], found[2]["sampling_params"] = plain, mixed
        found.append({"input_ids": prompts(40, 50), "sampling_params": plain, "return_logprob": True, "top_logprobs_num": 2})
    return found


def read(path: Path, vocabulary: int) -> Requests:
    """A user's traffic: one request per line, as JSON, sent one after the other.

    A request has a ``prompt``, ``input_ids``, or ``input_len`` (random tokens). ``output_len`` and ``sampling_params`` are optional.

    Raises:
        SettingsError: the file cannot be read, or a line is not a request.
    """
    rng = random.Random(0)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--traffic: {str(path)!r} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            asked = json.loads(line)
        except ValueError as error:
            raise SettingsError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(asked, dict) or not asked.keys() & {"prompt", "input_ids", "input_len"} or asked.keys() - _KEYS:
            raise SettingsError(
                f"{path}:{number}: expected an object with one of prompt, input_ids and input_len, and {', '.join(sorted(_KEYS))}"
            )
        sampling = {"ignore_eos": True, "max_new_tokens": asked.get("output_len", 16), **asked.get("sampling_params", {})}
        if "prompt" in asked:
            found.append({"prompt": [asked["prompt"]], "sampling_params": sampling})
        else:
            ids = asked.get("input_ids") or [rng.randrange(3, vocabulary) for _ in range(int(asked["input_len"]))]
            found.append({"input_ids": [ids], "sampling_params": sampling})
    if not found:
        raise SettingsError(f"--traffic: {str(path)!r} has no request")
    return found
