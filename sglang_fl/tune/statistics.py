# SPDX-License-Identifier: Apache-2.0
"""Statistics of pairs of adjacent measurements: the median ratio and its interval, with a few interim looks."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Results are looked at after this many pairs. The looks share the error level (Bonferroni): together at most 5 %.
LOOKS = (8, 12, 18)
_LEVEL = 1 - 0.05 / len(LOOKS)
#: Differences below this are never claimed, however quiet the machine is.
_LEAST = 0.01


@dataclass(frozen=True)
class Speed:
    """A speed as a multiple of native's: the median ratio of the pairs, and its interval. Above 1 is faster."""

    ratio: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def is_slower(self, noise: float) -> bool:
        """Whether it is slower, by its interval and by more than the smallest effect of this machine."""
        return self.high < 1 and self.ratio < slowed(noise)

    def is_faster(self, noise: float) -> bool:
        return self.low > 1 and self.ratio > 1 + noise

    def in_words(self, noise: float) -> str:
        """The speed, and what it shows beyond the smallest effect of this machine."""
        if self.is_faster(noise) or self.is_slower(noise):
            found = "faster" if self.ratio > 1 else "slower"
        elif self.low <= 1 <= self.high:
            found = "no difference can be shown"
        else:
            found = f"below the smallest effect, {100 * noise:.1f} %"
        return f"{self} of native's speed: {found}"


def speed(native: Sequence[float], other: Sequence[float]) -> Speed:
    """The speed from pairs of times.

    The interval of the median is from order statistics, without assumptions on the distribution (Conover, Practical Nonparametric
    Statistics, 3.2): of n pairs the k-th smallest and the k-th largest ratio, for the largest k with P(Binomial(n, 1/2) < k) at most
    half of the error level. With fewer than 7 pairs the interval is unbounded. Pairs with a time that is not positive are left out.
    """
    ratios = sorted(a / b for a, b in zip(native, other, strict=True) if a > 0 and b > 0)
    if not ratios:
        return Speed(math.nan, 0.0, math.inf, 0)
    k = _order(len(ratios))
    low, high = (ratios[k - 1], ratios[-k]) if k else (0.0, math.inf)
    return Speed(statistics.median(ratios), low, high, len(ratios))


def _order(count: int) -> int:
    """The largest k whose k-th order statistics contain the median at this level. 0: there is none."""
    below, k = 0.5**count, 0
    while 2 * below <= 1 - _LEVEL and k < count // 2:
        k += 1
        below += math.comb(count, k) * 0.5**count
    return k


def slowed(effect: float) -> float:
    """The speed that is as far below native's as ``1 + effect`` is above it."""
    return 1 / (1 + effect)


def smallest_effect(same: Speed) -> float:
    """The smallest effect that can be distinguished from noise, from native against native: 0.05 is 1.05 times as fast, or as slow."""
    return max(_LEAST, same.high - 1, 1 / same.low - 1 if same.low else math.inf)


def is_decided(speeds: Mapping[str, Speed], noise: Mapping[str, float]) -> bool:
    """Whether no more pairs are needed: each case is slower, faster, or equal within the smallest effect."""
    if any(speed.is_slower(noise[case]) for case, speed in speeds.items()):
        return True
    return all(
        speed.is_faster(noise[case]) or (speed.high <= 1 + noise[case] and speed.low >= slowed(noise[case]))
        for case, speed in speeds.items()
    )
