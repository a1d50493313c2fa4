# SPDX-License-Identifier: Apache-2.0
"""Times of functions, and their ratios."""

import time

import numpy as np
import pytest
import torch

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


def test_a_copy_moves_bytes() -> None:
    assert 1e8 < copy_bandwidth(CPU) < 1e13
