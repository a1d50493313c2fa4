# SPDX-License-Identifier: Apache-2.0
"""How long a run may take, and how long it will, by what its measurements took so far."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from .statistics import LOOKS

#: What a measurement of a kind is taken to take where none was made yet, in seconds.
SECONDS = {"start": 120.0, "pair": 30.0, "noise": 5.0, "check": 10.0, "time": 3.0, "record": 60.0, "about": 120.0}


class BudgetOver(Exception):
    """The time is used up. The message says before what."""


class Budget:
    """The time of a run.

    Args:
        deadline: of ``time.monotonic``; None: no limit.
        seconds: kind of measurement -> what those that were made took; it grows.

    Attributes:
        to_come: kind -> measurements that are still to come, as far as is known.
    """

    def __init__(self, deadline: float | None, seconds: Mapping[str, Sequence[float]]):
        self._deadline, self._seconds = deadline, seconds
        self.to_come = {"start": 4, "pair": LOOKS[-1], "noise": LOOKS[-1]}

    def check(self, kind: str, count: int = 1) -> None:
        """Raises BudgetOver if so many measurements of a kind would not end in time."""
        if self._deadline is not None and time.monotonic() + count * self.typical(kind) > self._deadline:
            raise BudgetOver(f"the time was used up before {f'{count} measurements' if count > 1 else 'a measurement'} of kind {kind!r}")

    @contextmanager
    def part(self, share: float) -> Iterator[None]:
        """In the block, only this share of the time that is left may be used."""
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
        """Seconds until the deadline; None: there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def typical(self, kind: str) -> float:
        """Seconds of a measurement of a kind; a fresh start takes about what the first one took."""
        known = self._seconds.get(kind) or (self._seconds.get("about") if kind == "start" else None)
        return sum(known) / len(known) if known else SECONDS[kind]

    def left(self) -> float:
        """Seconds that the run will take from now on, about."""
        return sum(count * self.typical(kind) for kind, count in self.to_come.items())
