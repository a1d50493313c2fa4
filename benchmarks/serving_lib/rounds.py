# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode at some batch sizes, on all engines in turn."""

from collections.abc import Sequence
from typing import Any

from sglang_fl.tune.engine import Engines
from sglang_fl.tune.served import Lengths, cases


def run_round(engines: Engines, number: int, batches: Sequence[int], lengths: Lengths, vocabulary: int, seed: int) -> dict[str, Any]:
    """Measure every case on every engine; an engine that fails is out of the run.

    The engines of a case get the same prompts, one right after the other; the order turns with each case and
    round (A B C D, D C B A, …). The others are stopped meanwhile.
    """
    found: dict[str, Any] = {"seconds": {}, "cached_tokens": 0}
    for index, case in enumerate(cases(batches)):
        prompts = case.prompts(vocabulary, lengths, (seed, number, index))
        seconds = found["seconds"][str(case)] = {}
        turn = 1 if (number + index) % 2 == 0 else -1
        for engine in engines.up[::turn]:
            with engines.alone(engine):
                measured = case.measure(engine, prompts, lengths)
                seconds[engine.name] = measured["seconds"]
                found["cached_tokens"] += measured["cached_tokens"]
    return found
