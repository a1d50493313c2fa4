# SPDX-License-Identifier: Apache-2.0
"""A profile on fresh starts, as a user starts a server: native, tuned, tuned, native."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .bench import Bench
from .journal import Journal
from .statistics import smallest_effect, speed

_ORDER = ("native", "tuned", "tuned", "native")
_ROUNDS = 8


@dataclass(frozen=True)
class Confirmed:
    """How fast the tuned starts were, and how far apart the native ones.

    Attributes:
        speeds: case -> the tuned starts' speed over the native ones'.
        apart: case -> the smallest effect that two starts which do not differ can show.
    """

    speeds: Mapping[str, float]
    apart: Mapping[str, float]

    def slower(self) -> dict[str, float]:
        """The cases in which tuned is below native, beyond what two native starts are apart."""
        return {case: ratio for case, ratio in self.speeds.items() if ratio < 1 - self.apart[case]}


def confirm(
    bench: Bench, journal: Journal, profile: Path, choice: str, noise: Mapping[str, float], check_budget: Callable[[str, int], None]
) -> Confirmed:
    """Start and measure four engines, those that the journal does not have yet, if the time suffices for all of them."""
    names = [f"{number} {side} {choice if side == 'tuned' else ''}" for number, side in enumerate(_ORDER)]
    if missing := sum(f"start: {name}" not in journal for name in names):
        check_budget("start", missing)
    native, tuned = bench.environ_of(None), bench.environ_of(profile)
    found: list[Mapping[str, list[float]]] = []
    for name, side in zip(names, _ORDER, strict=True):

        def measure(environ: Mapping[str, str] = native if side == "native" else tuned) -> dict[str, list[float]]:
            bench.start(environ)
            bench.round(0)  # kernels compile, and caches fill
            rounds = [bench.round(1 + index) for index in range(_ROUNDS)]
            bench.stop()
            return {case: [seconds[case] for seconds in rounds] for case in rounds[0]}

        found.append(journal.measured("start", name, measure))
    first, one, two, last = found
    speeds, apart = {}, {}
    for case in first:
        natives = [statistics.median([*pair]) for pair in zip(first[case], last[case], strict=True)]
        both = [statistics.median([*pair]) for pair in zip(one[case], two[case], strict=True)]
        speeds[case] = speed(natives, both).ratio
        apart[case] = max(noise[case], smallest_effect(speed(first[case], last[case])))
    return Confirmed(speeds, apart)
