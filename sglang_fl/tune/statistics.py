# SPDX-License-Identifier: Apache-2.0
"""What pairs of neighbouring measurements say: the median of their ratios and an interval, looked at a few times while they come."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: After so many pairs a result is looked at. Each look is at the level that all of them share (Bonferroni), so that together they are
#: wrong in 5 % of the cases at most.
LOOKS = (8, 12, 18)
_LEVEL = 1 - 0.05 / len(LOOKS)
#: More is a difference whatever the machine: below it nothing is claimed, however quiet the machine is.
_LEAST = 0.01


@dataclass(frozen=True)
class Speed:
    """How often as fast as native something is: the median of the pairs' ratios and its interval. Above 1 it is faster."""

    ratio: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def is_slower(self, noise: float) -> bool:
        """Beyond the interval, and beyond what the machine can show."""
        return self.high < 1 and self.ratio < 1 - noise

    def is_faster(self, noise: float) -> bool:
        return self.low > 1 and self.ratio > 1 + noise


def speed(native: Sequence[float], other: Sequence[float]) -> Speed:
    """Of pairs of times.

    The interval is that of the median by order statistics, which assumes nothing of how times are distributed (Conover, Practical
    Nonparametric Statistics, 3.2): with n pairs, the k-th smallest ratio and the k-th largest, for the largest k at which a binomial
    variable of n tosses is below k with a probability of at most half of what the level leaves. With fewer than 7 pairs there is none
    at this level, and the interval is everything. Pairs in which a time is not positive are left out.
    """
    ratios = sorted(a / b for a, b in zip(native, other, strict=True) if a > 0 and b > 0)
    if not ratios:
        return Speed(math.nan, 0.0, math.inf, 0)
    k = _order(len(ratios))
    low, high = (ratios[k - 1], ratios[-k]) if k else (0.0, math.inf)
    return Speed(statistics.median(ratios), low, high, len(ratios))


def _order(count: int) -> int:
    """The largest k for which the k-th order statistics hold the median at the level; 0: there is none."""
    below, k = 0.5**count, 0
    while 2 * below <= 1 - _LEVEL and k < count // 2:
        k += 1
        below += math.comb(count, k) * 0.5**count
    return k


def smallest_effect(same: Speed) -> float:
    """The smallest difference from 1 that can be told from none, of native against native."""
    return max(_LEAST, same.high - 1, 1 - same.low)


def is_decided(speeds: Mapping[str, Speed], noise: Mapping[str, float]) -> bool:
    """Whether more pairs would not change what is said: each case is slower, faster, or as fast as can be told."""
    if any(speed.is_slower(noise[case]) for case, speed in speeds.items()):
        return True
    return all(
        speed.is_faster(noise[case]) or (speed.high <= 1 + noise[case] and speed.low >= 1 - noise[case]) for case, speed in speeds.items()
    )
