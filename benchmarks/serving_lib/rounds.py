# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode at some batch sizes, on all engines in turn."""

from collections.abc import Iterator, Sequence
from typing import Any

from sglang_fl.tune.engine import Engine, Engines
from sglang_fl.tune.served import Lengths, cases, make_prompts


def run_round(engines: Engines, number: int, batches: Sequence[int], lengths: Lengths, vocabulary: int, seed: int) -> dict[str, Any]:
    """Measure every case on every engine; an engine that fails is out of the run.

    The engines of a case get the same prompts, one right after the other; the order turns with each case and
    round (A B C D, D C B A, …). The others are stopped meanwhile.
    """
    found: dict[str, Any] = {"seconds": {}, "cached_tokens": 0}
    for index, case in enumerate(cases(batches)):
        prompts = make_prompts(vocabulary, 2 * case.batch, getattr(lengths, case.phase), (seed, number, index))
        seconds = found["seconds"][str(case)] = {}
        for engine in _turning(engines.up, number + index):
            with engines.alone(engine):
                measured = case.measure(engine, prompts[: case.batch], prompts[case.batch :], lengths)
                seconds[engine.name] = measured["seconds"]
                found["cached_tokens"] += measured["cached_tokens"]
    return found


def _turning(engines: Sequence[Engine], turn: int) -> Iterator[Engine]:
    return iter(engines) if turn % 2 == 0 else reversed(engines)
