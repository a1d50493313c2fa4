# SPDX-License-Identifier: Apache-2.0
"""Times of functions, and their ratios."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_fl.tune import timing
from sglang_fl.tune.timing import Candidate, compare, copy_bandwidth, first_error, paired_ratio

CPU = torch.device("cpu")


def failing() -> None:
    raise ZeroDivisionError("out of luck")


def test_a_candidate_that_fails_leaves_the_others() -> None:
    def slow() -> None:
        time.sleep(0.001)

    timings = compare({"slow": Candidate([slow]), "broken": Candidate([failing]), "slower": Candidate([slow, slow])}, CPU, 3)
    assert timings["broken"].error == "ZeroDivisionError: out of luck"
    assert timings["slow"].us is not None and timings["slow"].us > 900
    assert timings["slower"].ratio is not None


def test_the_interval_of_a_paired_ratio_holds_the_true_one_and_narrows() -> None:
    rng = np.random.default_rng(1)
    widths = []
    for count in (15, 240):
        clock = rng.uniform(1, 2, count)  # a machine that changes its speed
        median, low, high = paired_ratio(3 * clock * rng.normal(1, 0.01, count), 2 * clock)
        assert low <= median <= high and low <= 1.5 <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2 < 0.03
    assert paired_ratio(clock, clock) == (1.0, 1.0, 1.0)


def test_the_error_that_spoiled_a_capture_is_told() -> None:
    def capturing() -> None:
        try:
            raise ValueError("a pinned allocation")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as caught:
        capturing()
    assert first_error(caught.value) == "ValueError: a pinned allocation"


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """The calls that were captured on a stand-in for CUDA. Its captures call the function, which may raise."""
    found: list[Callable[[], Any]] = []

    def capture(candidate: Candidate, count: int) -> tuple[Any, Any]:
        found.append(candidate.calls[0])
        if isinstance(planted := getattr(candidate.calls[0], "in_capture", None), Exception):
            raise planted
        return None, None

    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(timing, "warm_up", lambda candidate: 10.0)
    monkeypatch.setattr(timing, "_replays", lambda graph: 1)
    monkeypatch.setattr(timing, "_replay", lambda graph, replays, count: 5.0)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(synchronize=lambda: None))
    return found


def call(in_capture: Exception | None = None) -> Callable[[], Any]:
    def copied() -> None: ...

    copied.in_capture = in_capture  # type: ignore[attr-defined]
    return copied


def test_where_native_cannot_be_captured_the_host_is_timed(captured: list[Callable[[], Any]]) -> None:
    own, theirs = call(RuntimeError("Cannot copy during capture")), call()
    found = compare({"own": Candidate([own]), "theirs": Candidate([theirs])}, torch.device("cuda"), 3)
    assert captured == [own], "what no graph holds is not captured"
    assert found["own"].uncaptured == "RuntimeError: Cannot copy during capture" and found["own"].error is None
    assert found["own"].us is found["theirs"].us is None and found["own"].host_us and found["theirs"].host_ratio


def test_what_cannot_be_captured_in_place_of_native_has_an_error(captured: list[Callable[[], Any]]) -> None:
    own, theirs = call(), call(RuntimeError("not permitted"))
    found = compare({"own": Candidate([own]), "theirs": Candidate([theirs])}, torch.device("cuda"), 3)
    assert found["own"].us == 5.0 and found["own"].uncaptured is None and found["theirs"].error == "RuntimeError: not permitted"


def test_too_little_memory_does_not_say_where_native_is_called(captured: list[Callable[[], Any]]) -> None:
    found = compare({"own": Candidate([call(torch.OutOfMemoryError("out of memory"))])}, torch.device("cuda"), 3)
    assert found["own"].uncaptured is None and found["own"].error == "OutOfMemoryError: out of memory"


def test_a_copy_moves_bytes() -> None:
    assert 1e8 < copy_bandwidth(CPU) < 1e13
