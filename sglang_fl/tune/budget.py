# SPDX-License-Identifier: Apache-2.0
"""The time budget of a run, and the estimated remaining time from the measurements so far."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from .statistics import LOOKS

#: The assumed seconds of a measurement, until one of its kind was made.
SECONDS = {"start": 120.0, "pair": 30.0, "noise": 5.0, "check": 10.0, "time": 3.0, "record": 60.0, "about": 120.0}


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
        self._deadline, self._seconds = deadline, seconds
        self.to_come = {"start": 4, "pair": LOOKS[-1], "noise": LOOKS[-1]}

    def check(self, kind: str, count: int = 1) -> None:
        """Raise BudgetOver if this many measurements of a kind would exceed the budget."""
        if self._deadline is not None and time.monotonic() + count * self.typical(kind) > self._deadline:
            raise BudgetOver(f"the budget was used up before {f'{count} measurements' if count > 1 else 'a measurement'} of kind {kind!r}")

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
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def typical(self, kind: str) -> float:
        """The typical seconds of a measurement of this kind. A fresh start takes about as long as the first start."""
        known = self._seconds.get(kind) or (self._seconds.get("about") if kind == "start" else None)
        return sum(known) / len(known) if known else SECONDS[kind]

    def left(self) -> float:
        """The approximate remaining seconds of the run."""
        return sum(count * self.typical(kind) for kind, count in self.to_come.items())
