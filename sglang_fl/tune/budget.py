# SPDX-License-Identifier: Apache-2.0
"""The time budget of a run, and the estimated remaining time from the measurements so far."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from .statistics import LOOKS


class Kind(NamedTuple):
    """A kind of measurement.

    Attributes:
        words: its name in the plural.
        seconds: the assumed seconds of one, used until one was made.
    """

    words: str
    seconds: float


KINDS = {
    "about": Kind("first start of an engine", 120.0),
    "noise": Kind("pairs of native and itself", 5.0),
    "record": Kind("recording of all calls", 60.0),
    "check": Kind("checks of a recorded call", 1.0),
    "time": Kind("timings of a recorded call", 0.3),
    "pair": Kind("pairs of native and candidates", 30.0),
    "start": Kind("fresh starts", 120.0),
}


class BudgetOver(Exception):
    """The budget is used up. The message says before which measurement."""


class Budget:
    """The time of a run.

    Args:
        deadline: of ``time.monotonic``. None: no limit.
        seconds: kind of measurement -> the seconds of those made so far; it grows.

    Attributes:
        to_come: kind -> the number of remaining measurements, as far as known.
    """

    def __init__(self, deadline: float | None, seconds: Mapping[str, Sequence[float]]):
        self._deadline, self._end, self._seconds = deadline, deadline, seconds
        self.to_come = {"about": 1, "noise": LOOKS[-1], "record": 1, "pair": LOOKS[-1], "start": 4}

    def check(self, kind: str) -> None:
        """Raise BudgetOver if another measurement of a kind would exceed the budget.

        Where none was made yet, time must be left, whatever is assumed: or else a short budget never gets to the first one.
        """
        seconds, measured = self.typical(kind)
        if self._deadline is not None and time.monotonic() + (seconds if measured else 0.0) > self._deadline:
            before = "the engine was started" if kind == "about" else f"more {KINDS[kind].words}"
            raise BudgetOver(f"the budget was used up before {before}")

    @contextmanager
    def part(self, share: float) -> Iterator[None]:
        """Within the block, only this share of the remaining time may be used."""
        whole = self._deadline
        if whole is not None:
            now = time.monotonic()
            self._deadline = now + share * max(0.0, whole - now)
        try:
            yield
        finally:
            self._deadline = whole

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline. None: no limit."""
        return _until(self._deadline)

    def typical(self, kind: str, average: Callable[[Sequence[float]], float] = statistics.median) -> tuple[float, bool]:
        """The typical seconds of a measurement of this kind, and whether one was made. A fresh start takes about as long as the first.

        For the time of many, use the mean: a few that compile take most of it.
        """
        known = self._seconds.get(kind) or (self._seconds.get("about") if kind == "start" else None)
        return (average(known), True) if known else (KINDS[kind].seconds, False)

    def left(self) -> tuple[float, bool]:
        """The approximate remaining seconds of the run, and whether it is the budget that ends it then."""
        needed = sum(count * self.typical(kind, statistics.fmean)[0] for kind, count in self.to_come.items())
        budget = _until(self._end)
        return (needed, False) if budget is None or needed <= budget else (budget, True)


def _until(moment: float | None) -> float | None:
    """Seconds until then, at least 0. None: no limit."""
    return None if moment is None else max(0.0, moment - time.monotonic())
