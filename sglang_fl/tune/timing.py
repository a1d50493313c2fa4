# SPDX-License-Identifier: Apache-2.0
"""Compares the time of functions on the device and on the host.

On CUDA a candidate's calls are captured into one graph, as in serving, so that only the device is timed. The
graph cycles over several sets of inputs and outputs, more than twice the size of the L2 cache. The host's time
is that of the eager call, without waiting for the device. On a CPU only wall time is measured.

Rounds alternate (A B C, C B A), so that clock changes and other load affect all candidates alike. A ratio to the
first candidate is the median of the rounds' ratios, with a 95 % bootstrap interval.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

CALLS, ROUNDS = 20, 15
#: One timing lasts at least this long, and a graph at most about ten times it.
_LEAST_US = 1000.0
_WARM_UP = 3
_RESAMPLES = 10_000
#: The number of fp32 numbers to copy for measuring the bandwidth: far more than a cache holds.
_COPIED_NUMBERS = {"cuda": (1 << 27, 1 << 28, 1 << 29), "cpu": (1 << 24,)}

Ratio = tuple[float, float, float]


class CaptureStateLost(RuntimeError):
    """A failed capture left the process unable to capture graphs. Start a new process."""


@dataclass(frozen=True)
class Candidate:
    """A function to time.

    Attributes:
        calls: the same call, once for each set of inputs.
        active: a context around the calls, for a candidate that must be switched on.
    """

    calls: Sequence[Callable[[], Any]]
    active: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Medians in microseconds per call, and (median, low, high) of the ratio to the first candidate.

    ``uncaptured``: why the call cannot be captured in a graph; then only the host's time was measured.
    """

    us: float | None = None
    ratio: Ratio | None = None
    host_us: float | None = None
    host_ratio: Ratio | None = None
    error: str | None = None
    uncaptured: str | None = None


def input_sets(set_bytes: int, device: torch.device) -> int:
    """How many sets of inputs and outputs of this size exceed twice the L2 cache. At most CALLS."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(CALLS, math.ceil(2 * cache / max(1, set_bytes))))


def compare(candidates: Mapping[str, Candidate], device: torch.device, rounds: int = ROUNDS, *, graphs: bool = True) -> dict[str, Timing]:
    """Time candidates against the first one. One that fails is returned with its error.

    Where the first cannot be captured, no graph holds such a call: none is captured, and the first one's ``uncaptured`` says why.

    Args:
        graphs: False for calls that cannot be captured: only the host's time is measured.

    Raises:
        CaptureStateLost: a failed capture cannot be cleaned up.
    """
    errors: dict[str, str] = {}
    baseline = next(iter(candidates))
    uncaptured: str | None = None
    on_device: dict[str, Callable[[], float]] = {}
    on_host: dict[str, Callable[[], float]] = {}
    synchronize = torch.get_device_module(device).synchronize
    for name, candidate in candidates.items():
        try:
            if device.type != "cuda":
                us = _host_us(candidate, _WARM_UP, synchronize)
                on_device[name] = partial(_host_us, candidate, math.ceil(_LEAST_US / max(1.0, us)), synchronize)
                continue
            us = warm_up(candidate)
            if graphs and uncaptured is None:
                # At least once around all sets; short of that, no more calls than fit the time.
                count = max(min(len(candidate.calls), CALLS), min(CALLS, math.ceil(10 * _LEAST_US / us)))
                try:
                    graph, _ = capture(candidate, count)
                except RuntimeError as error:
                    if name != baseline or isinstance(error, CaptureStateLost | torch.OutOfMemoryError):
                        raise
                    uncaptured = first_error(error)
                else:
                    on_device[name] = partial(_replay, graph, _replays(graph), count)
            on_host[name] = partial(_host_us, candidate, max(5, min(CALLS, math.ceil(5 * _LEAST_US / us))), synchronize)
        except CaptureStateLost:
            raise
        except Exception as error:
            errors[name] = first_error(error)
    device_us, host_us = rounds_of(on_device, rounds), rounds_of(on_host, rounds)
    found = {name: Timing(error=errors[name]) if name in errors else _timing(name, baseline, device_us, host_us) for name in candidates}
    return {**found, baseline: replace(found[baseline], uncaptured=uncaptured)}


def _timing(name: str, baseline: str, device_us: Mapping[str, np.ndarray[Any, Any]], host_us: Mapping[str, np.ndarray[Any, Any]]) -> Timing:
    def median(times: Mapping[str, np.ndarray[Any, Any]]) -> float | None:
        return float(np.median(times[name])) if name in times else None

    def ratio(times: Mapping[str, np.ndarray[Any, Any]]) -> Ratio | None:
        return paired_ratio(times[name], times[baseline]) if name in times and baseline in times else None

    return Timing(median(device_us), ratio(device_us), median(host_us), ratio(host_us))


def paired_ratio(times: npt.ArrayLike, baseline: npt.ArrayLike) -> Ratio:
    """The median of the rounds' ratios, and its 95 % bootstrap interval. In pairs, because other load in a round affects both."""
    ratios = np.asarray(times) / np.asarray(baseline)
    medians = np.median(np.random.default_rng(0).choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


def rounds_of(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray[Any, Any]]:
    """The results of each measure by round. The order is reversed each time."""
    times: dict[str, list[float]] = {name: [] for name in measures}
    order = list(measures)
    for _ in range(rounds):
        for name in order:
            times[name].append(measures[name]())
        order.reverse()
    return {name: np.array(found) for name, found in times.items()}


def warm_up(candidate: Candidate) -> float:
    """Run all calls on a separate stream, as capturing requires.

    Returns:
        The approximate time of one call in microseconds.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), candidate.active():
        for _ in range(math.ceil(_WARM_UP / len(candidate.calls))):
            for call in candidate.calls:
                call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        candidate.calls[0]()
        end.record()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return max(0.1, 1000 * start.elapsed_time(end))


def capture(candidate: Candidate, count: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of this many calls of a warmed-up candidate, and the last call's result.

    Raises:
        CaptureStateLost: the capture failed, and this process cannot capture any more.
        Exception: the capture failed; the process can continue.
    """
    calls = candidate.calls
    stream = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    # Keep outputs until their inputs are used again, so that outputs cycle through memory as inputs do.
    kept: deque[Any] = deque(maxlen=len(calls))
    try:
        with candidate.active(), torch.cuda.graph(graph):
            for i in range(count):
                kept.append(calls[i % len(calls)]())
    except Exception as error:
        kept.clear()
        torch.cuda.set_stream(stream)  # torch.cuda.graph does not, if ending the capture raises
        if not _can_capture():
            raise CaptureStateLost(first_error(error)) from error
        raise
    return graph, kept[-1]


def _can_capture() -> bool:
    """Whether streams, memory and random numbers work after a failed capture."""
    stream = torch.cuda.current_stream()
    try:
        torch.cuda.synchronize()
        x = torch.randn(4, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x + 1
        graph.replay()
        return torch.equal(y, x + 1)
    except RuntimeError:
        torch.cuda.set_stream(stream)
        return False


def first_error(error: BaseException) -> str:
    """An error in one line. If the end of a capture raised, the error that invalidated the capture."""
    while error.__cause__ or (error.__context__ and "captur" in str(error)):
        error = error.__cause__ or error.__context__ or error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _replays(graph: torch.cuda.CUDAGraph) -> int:
    """How often to replay a graph for one timing."""
    graph.replay()
    return max(1, min(1000, math.ceil(_LEAST_US / max(1.0, _replay(graph, 3, 1)))))


def _replay(graph: torch.cuda.CUDAGraph, replays: int, count: int) -> float:
    """Microseconds per call of a replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / (replays * count)


def _host_us(candidate: Candidate, count: int, synchronize: Callable[[], None]) -> float:
    """Microseconds of the host per call. There are few enough calls for the device's queue."""
    calls = candidate.calls
    with candidate.active():
        synchronize()
        start = time.perf_counter_ns()
        for i in range(count):
            calls[i % len(calls)]()
        end = time.perf_counter_ns()
        synchronize()
    return (end - start) / 1000 / count


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by a large copy on the device: the best of several sizes and two methods.

    A plain copy uses the driver's kernel, which is not the fastest. A negating copy uses PyTorch's element-wise kernel.
    """
    reached = 0.0
    for numbers in _COPIED_NUMBERS[device.type]:
        source = torch.ones(numbers, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        ways = {"copy": Candidate([partial(target.copy_, source)]), "negate": Candidate([partial(torch.neg, source, out=target)])}
        for timing in compare(ways, device, rounds=5).values():
            if timing.us is None:
                raise RuntimeError(f"a copy of {numbers} numbers on {device} cannot be timed: {timing.error}")
            reached = max(reached, 2 * source.nbytes / timing.us * 1e6)
        del source, target, ways
    return reached
