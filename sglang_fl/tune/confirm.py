# SPDX-License-Identifier: Apache-2.0
"""Measures a profile on fresh starts, as a user starts a server: native, tuned, tuned, native."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bench import Bench
from .engine import EngineFailed
from .judge import SLOWER_SERVED, UNDECIDED, USED
from .statistics import slowed, smallest_effect, speed

_ORDER = ("native", "tuned", "tuned", "native")
_ROUNDS = 8


@dataclass(frozen=True)
class Confirmed:
    """The speed of the tuned starts, and how far the starts of either kind are apart.

    Attributes:
        speeds: case -> the tuned starts' speed divided by the native ones'.
        apart: case -> the smallest effect that can be shown between two native starts.
        tuned_apart: case -> likewise between the two tuned starts.
    """

    speeds: Mapping[str, float]
    apart: Mapping[str, float]
    tuned_apart: Mapping[str, float]

    def slower(self) -> dict[str, float]:
        """The cases in which tuned is slower than native by more than two native starts differ."""
        return {case: ratio for case, ratio in self.speeds.items() if ratio < slowed(self.apart[case])}

    def verdict(self) -> tuple[str, str]:
        """The candidates' status, and why nothing is used: empty if the profile is confirmed."""
        slower = self.slower()
        if not slower:
            return USED, ""
        shown = "on fresh starts it had " + ", ".join(f"{ratio:.3f} of native's speed in {case}" for case, ratio in slower.items())
        if any(ratio < slowed(self.tuned_apart[case]) for case, ratio in slower.items()):
            return SLOWER_SERVED, shown
        return UNDECIDED, f"{shown}, but its own two starts differ by more. Tune again without --resume, with nothing else on this machine"

    def in_words(self, case: str) -> str:
        ratio, apart = self.speeds[case], self.apart[case]
        is_faster = ratio > 1 + max(apart, self.tuned_apart[case])
        found = "slower" if case in self.slower() else "faster" if is_faster else "no difference can be shown"
        return f"{ratio:.3f} of native's speed: {found} (two starts differ {_by(apart)}, with the profile {_by(self.tuned_apart[case])})"


def _by(effect: float) -> str:
    return f"by up to {100 * effect:.1f} %" if effect < 1 else "more than twofold"


def confirm(bench: Bench, measured: Callable[..., Any], profile: Path, choice: str, noise: Mapping[str, float]) -> Confirmed | str:
    """Start and measure four engines. ``measured`` makes those that are not in the journal, and raises when the time is used up.

    Returns:
        the results, or why an engine with the profile failed.

    Raises:
        EngineFailed: a native engine failed.
    """
    names = [f"{number} {side} {choice if side == 'tuned' else ''}" for number, side in enumerate(_ORDER)]
    native, tuned = bench.environ_of(None), bench.environ_of(profile)
    found: list[Mapping[str, list[float]]] = []
    for name, side in zip(names, _ORDER, strict=True):

        def measure(environ: Mapping[str, str] = native if side == "native" else tuned) -> dict[str, list[float]] | str:
            try:
                bench.start(environ)
                bench.round(0)  # compile kernels and fill caches
                rounds = [bench.round(1 + index) for index in range(_ROUNDS)]
            except EngineFailed as error:
                if environ is native:
                    raise
                return str(error).splitlines()[0]
            bench.stop()
            return {case: [seconds[case] for seconds in rounds] for case in rounds[0]}

        one = measured("start", name, measure)
        if isinstance(one, str):
            return one
        found.append(one)
    first, one, two, last = found
    speeds, apart, tuned_apart = {}, {}, {}
    for case in first:
        natives = [statistics.median([*pair]) for pair in zip(first[case], last[case], strict=True)]
        both = [statistics.median([*pair]) for pair in zip(one[case], two[case], strict=True)]
        speeds[case] = speed(natives, both).ratio
        apart[case] = max(noise[case], smallest_effect(speed(first[case], last[case])))
        tuned_apart[case] = max(noise[case], smallest_effect(speed(one[case], two[case])))
    return Confirmed(speeds, apart, tuned_apart)
