# SPDX-License-Identifier: Apache-2.0
"""The requests for recording a model: from a user's file, or a mix of typical serving."""

import inspect
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config import SettingsError
from ..device import probe
from ..platform.absent_packages import stand_in_for_absent_packages
from ..utils.suggest import suggest

#: Batches: the arguments of ``sglang.Engine.generate`` for each.
Requests = Sequence[dict[str, Any]]

_SOURCES = ("prompt", "input_ids", "input_len")
_MOST_TOKENS = 1 << 20


def _is_count(value: Any, least: int = 1, end: int = _MOST_TOKENS) -> bool:
    return type(value) is int and least <= value < end


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
        lines = path.read_text(encoding="utf-8").split("\n")  # a line's text may have other line breaks of Unicode
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
        if problem := _problem(asked, vocabulary):
            raise SettingsError(f"{path}:{number}: {problem}")
        given = asked.get("sampling_params", {})
        sampling = {"ignore_eos": True, "max_new_tokens": asked.get("output_len", 16), **given}
        if given and (problem := _sampling_problem(sampling, vocabulary)):
            raise SettingsError(f"{path}:{number}: sampling_params: {problem}")
        if "prompt" in asked:
            found.append({"prompt": [asked["prompt"]], "sampling_params": sampling})
        else:
            ids = asked.get("input_ids") or [rng.randrange(3, vocabulary) for _ in range(asked["input_len"])]
            found.append({"input_ids": [ids], "sampling_params": sampling})
    if not found:
        raise SettingsError(f"--traffic: {str(path)!r} has no request")
    return found


def _problem(asked: Any, vocabulary: int) -> str | None:
    """Why a line's value is not a request."""
    count = f"a whole number from 1 to {_MOST_TOKENS - 1}"
    fields: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "prompt": ("a text", lambda value: isinstance(value, str) and bool(value)),
        "input_ids": (
            f"a list of token ids below {vocabulary}",
            lambda value: isinstance(value, list) and bool(value) and all(_is_count(token, 0, vocabulary) for token in value),
        ),
        "input_len": (count, _is_count),
        "output_len": (count, _is_count),
        "sampling_params": ("an object", lambda value: isinstance(value, dict)),
    }
    if not isinstance(asked, dict):
        return f"expected an object with one of {', '.join(_SOURCES)}, found {asked!r}"
    for name, value in asked.items():
        if name not in fields:
            return f"expected no {name!r}{suggest(name, list(fields))}"
        expected, fits = fields[name]
        if not fits(value):
            return f"{name}: expected {expected}, found {value!r}"
    if len(asked.keys() & {*_SOURCES}) != 1:
        return f"expected one of {', '.join(_SOURCES)}, found {', '.join(asked) or 'nothing'}"
    return None


def _sampling_problem(sampling: dict[str, Any], vocabulary: int) -> str | None:
    """Why SGLang would refuse sampling parameters."""
    stand_in_for_absent_packages(probe())
    from sglang.srt.sampling.sampling_params import SamplingParams

    names = list(inspect.signature(SamplingParams).parameters)
    for name in sampling:
        if name not in names:
            return f"SGLang has no {name!r}{suggest(name, names)}"
    try:
        SamplingParams(**sampling).verify(vocabulary)
    except (TypeError, ValueError) as error:
        return f"SGLang refuses {sampling}: {error}"
    return None
