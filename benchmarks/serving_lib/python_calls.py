# SPDX-License-Identifier: Apache-2.0
"""What Python does on the host in a step of SGLang's scheduler: its calls, by function, and how two engines differ in them.

A step's time at a small batch is the host's, and other programs disturb it; the calls are the same each time.
"""

import bisect
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .kernels import differing, trace_events

#: A step of the scheduler begins where this is called.
_STEP = re.compile(r"managers/scheduler\.py\(\d+\): run_batch$")
#: Addresses of objects, and where sglang-fl lies when it runs from a checkout (SGLang's own paths begin at the package).
_STRIPPED = re.compile(r"0x[0-9a-f]+|^/.*/(?=sglang_fl/)")
#: The first steps after a prefill differ from those that follow (results come one step later), the last one has no end.
_SETTLING, _ENDING = 3, 2
_LEAST_STEPS = 5
#: New tokens of a batch whose trace has enough decode steps.
DECODE_TOKENS = _SETTLING + _LEAST_STEPS + _ENDING


def decode_step(trace: Path) -> dict[str, int]:
    """The calls in a decode step: function -> how often, the median of the steps, so that what is done now and then is left out.

    Args:
        trace: of one batch that is decoded for a while, by torch's profiler with stacks (``.json.gz``).

    Raises:
        ValueError: there are too few steps in it.
    """
    events, starts, _ = _read(trace)
    steps = _count(events, starts, [*starts[1:], float("inf")])
    return _median(steps[_SETTLING:-_ENDING], trace)


def prefill_step(trace: Path) -> dict[str, int]:
    """Likewise of prefills, one after another, each a step; the calls within ``run_batch``, since the engine is idle between them."""
    events, starts, ends = _read(trace)
    return _median(_count(events, starts, ends), trace)


def compare(baseline: Mapping[str, int], other: Mapping[str, int]) -> dict[str, Any]:
    """How many calls a step makes, whether they are the same by function and count, and else both counts of those that differ."""
    found = differing(baseline, other)
    return {"identical": not found, "calls_per_step": sum(other.values()), "differing": found}


def _read(trace: Path) -> tuple[list[dict[str, Any]], list[float], list[float]]:
    """All calls, and when the scheduler's steps begin and end, in microseconds."""
    events = [event for event in trace_events(trace) if event.get("cat") == "python_function"]
    steps = sorted((event for event in events if _STEP.search(event["name"])), key=lambda event: float(event["ts"]))
    return events, [event["ts"] for event in steps], [event["ts"] + event["dur"] for event in steps]


def _count(events: Sequence[Mapping[str, Any]], starts: Sequence[float], ends: Sequence[float]) -> list[Counter[str]]:
    """The calls between the start and the end of each step."""
    counts: list[Counter[str]] = [Counter() for _ in starts]
    for event in events:
        step = bisect.bisect_right(starts, event["ts"]) - 1
        if step >= 0 and event["ts"] < ends[step]:
            counts[step][_STRIPPED.sub("", event["name"])] += 1
    return counts


def _median(steps: Sequence[Counter[str]], trace: Path) -> dict[str, int]:
    if len(steps) < _LEAST_STEPS:
        raise ValueError(f"{trace.name} has {len(steps)} whole steps of the scheduler, and {_LEAST_STEPS} are needed")
    medians = {name: statistics.median_low(step[name] for step in steps) for name in sorted(set().union(*steps))}
    return {name: count for name, count in medians.items() if count}
