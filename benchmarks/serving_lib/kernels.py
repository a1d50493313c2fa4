# SPDX-License-Identifier: Apache-2.0
"""What a window of steps ran on the device, by kernel name, and how two engines differ in it."""

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What differs between processes in the names of compiled kernels: hexadecimal hashes and addresses. A
#: hash is a word of 8 to 64 digits and letters a to f, with at least one of each.
STRIPPED = r"0x[0-9a-f]+|(?<![0-9A-Za-z])(?=[a-f]*[0-9])(?=[0-9]*[a-f])[0-9a-f]{8,64}(?![0-9A-Za-z])"
#: The trace's categories that are work of the device; on a CPU, operators take their place.
_KERNELS, _COPIES, _OPERATORS = ("kernel",), ("gpu_memcpy", "gpu_memset"), ("cpu_op",)
#: The host's calls of CUDA, launches and waits.
_HOST_CALLS = ("cuda_runtime", "cuda_driver")
_TOP = 25


def strip(name: str) -> str:
    """A kernel's name without what differs between processes."""
    return re.sub(STRIPPED, "#", name)


@dataclass
class Window:
    """What ran on the device between two moments.

    Kernels that are launched with programmatic dependent launch begin while the kernel before them runs, and wait for it.
    So the sum of ``microseconds`` may count a time twice; ``busy_microseconds`` does not.
    Copies and memsets count in neither. They are few, and most are the host's, on engines of their own beside kernels.
    Without them the two measures are equal where no kernels overlap. ``compare`` tells if engines differ in ``copies``.

    Attributes:
        kind: ``kernels``, or ``operators`` on a CPU.
        kernels: name -> how often it ran.
        microseconds: name -> the sum of its durations.
        busy_microseconds: the time in which at least one kernel ran.
        copies: name -> how often it ran.
        host_microseconds: name of a call of CUDA -> the time that the host spent in it, waits included.
    """

    kind: str
    kernels: Counter[str]
    microseconds: Counter[str]
    busy_microseconds: float
    copies: Counter[str]
    host_microseconds: Counter[str]

    def __sub__(self, other: "Window") -> "Window":
        """What this window has more than another, which is its beginning."""
        return Window(
            self.kind,
            _difference(self.kernels, other.kernels),
            _difference(self.microseconds, other.microseconds),
            self.busy_microseconds - other.busy_microseconds,
            _difference(self.copies, other.copies),
            _difference(self.host_microseconds, other.host_microseconds),
        )

    def per_step(self, steps: int) -> dict[str, Any]:
        """The window as JSON.

        ``kernels`` and ``copies``: name -> count per step. ``microseconds_per_step``: the sum of the kernels' durations.
        ``busy_microseconds_per_step``: the time in which at least one ran. ``top``: the kernels with the longest durations.
        ``host_microseconds_per_step``: name of a call of CUDA -> the host's time in it, under the profiler.
        """
        kernels = {name: count / steps for name, count in sorted(self.kernels.items()) if count}
        slowest = sorted(kernels, key=lambda name: (-self.microseconds[name], name))[:_TOP]
        return {
            "kind": self.kind,
            "steps": steps,
            "kernels": kernels,
            "copies": {name: count / steps for name, count in sorted(self.copies.items()) if count},
            "microseconds_per_step": sum(self.microseconds.values()) / steps,
            "busy_microseconds_per_step": self.busy_microseconds / steps,
            "host_microseconds_per_step": {name: us / steps for name, us in sorted(self.host_microseconds.items()) if us},
            "top": [
                {"name": name, "count_per_step": kernels[name], "microseconds_per_step": self.microseconds[name] / steps}
                for name in slowest
            ],
        }


def _difference(ours: Counter[str], theirs: Counter[str]) -> Counter[str]:
    """Also what is zero or below, which ``-`` would drop."""
    found = Counter(ours)
    found.subtract(theirs)
    return found


def trace_events(trace: Path) -> list[dict[str, Any]]:
    """The events of a trace of torch's profiler (``.json.gz``), which need not be in order."""
    with gzip.open(trace, "rt", encoding="utf-8", errors="replace") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def read_window(trace: Path) -> Window:
    """What a trace of torch's profiler (``.json.gz``) has.

    On a CPU, "kernels" are ATen operators, whose times include those of the operators they call.
    """
    events = [event for event in trace_events(trace) if event.get("ph") == "X"]
    kernels = [event for event in events if event.get("cat") in _KERNELS]
    kind = "kernels"
    if not kernels:
        kernels, kind = [event for event in events if event.get("cat") in _OPERATORS], "operators"
    if not kernels:
        raise ValueError("nothing that ran is in the trace")
    busy = union((event["ts"], event.get("dur", 0.0)) for event in kernels)
    host = _durations(event for event in events if event.get("cat") in _HOST_CALLS)
    copies = Counter(strip(event["name"]) for event in events if event.get("cat") in _COPIES)
    return Window(kind, Counter(strip(event["name"]) for event in kernels), _durations(kernels), busy, copies, host)


def _durations(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """The sum of the durations by name."""
    microseconds: Counter[str] = Counter()
    for event in events:
        microseconds[strip(event["name"])] += event.get("dur", 0.0)
    return microseconds


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the intervals lasted. They are pairs of start and duration, in any order."""
    total, end = 0.0, -math.inf
    for start, duration in sorted(intervals):
        total += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total


def compare(baseline: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Whether two windows ran the same kernels equally often; else both counts of those that differ."""
    found = differing(baseline["kernels"], other["kernels"])
    return {"identical": not found, "differing": found, "differing_copies": differing(baseline["copies"], other["copies"])}


def differing(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, list[float]]:
    """Both counts of each name whose counts are not the same."""
    pairs = {name: [ours.get(name, 0), theirs.get(name, 0)] for name in sorted({*ours, *theirs})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
