# SPDX-License-Identifier: Apache-2.0
"""What the rounds say: medians, and ratios to the baseline with their uncertainty."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_fl.tune.timing import paired_ratio

#: With fewer the bootstrap's 95 % intervals are far from holding 95 %.
LEAST_ROUNDS = 6
#: Half the width that the interval of a second engine of the baseline may have. Beyond, only what lies outside of it is resolved.
WIDEST = 0.05


def against(run: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """A run's data with another of its variants as the baseline of the speeds."""
    tokens = {row["case"]: round(row["tokens_per_second"] * row["seconds"]) for row in run["summary"] if row["tokens_per_second"]}
    return {**run, "baseline": baseline, "summary": summarize(run["rounds"], list(run["variants"]), baseline, tokens)}


def resolved(row: Mapping[str, Any], again: Mapping[str, Any] | None) -> bool:
    """Whether a ratio says something: two engines of the baseline differ by little, or by less than this.

    Args:
        again: the same case's row of the second engine of the baseline, if one ran.
    """
    if again is None or again is row or "ratio" not in again or again["high"] - again["low"] <= 2 * WIDEST:
        return True
    return bool(row["high"] < again["low"] or row["low"] > again["high"])


@dataclass(frozen=True)
class Tally:
    """How many intervals of ratios there are, and how many of them lie wholly above 1 (faster) or below."""

    intervals: int
    faster: int
    slower: int

    def __str__(self) -> str:
        held = self.intervals - self.faster - self.slower
        return (
            f"{held} of {self.intervals} intervals hold 1, {self.faster} lie above it, {self.slower} below "
            f"(were the speeds equal, {0.05 * self.intervals:.1f} would miss it by chance)"
        )


def tally(runs: Sequence[Mapping[str, Any]]) -> dict[str, Tally]:
    """Over several runs, for each variant."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        for row in run["summary"]:
            if "ratio" in row:
                rows.setdefault(row["variant"], []).append(row)
    return {
        variant: Tally(len(found), sum(row["low"] > 1 for row in found), sum(row["high"] < 1 for row in found))
        for variant, found in rows.items()
    }


def summarize(
    rounds: Sequence[Mapping[str, Any]], variants: Sequence[str], baseline: str, tokens: Mapping[str, int]
) -> list[dict[str, Any]]:
    """A row for each case and variant.

    Args:
        rounds: each with ``seconds``: case -> variant -> seconds; a variant that failed is absent.
        tokens: case -> how many tokens are processed in those seconds.

    Returns:
        Rows of case, variant, rounds, seconds (the median), tokens_per_second and, but for the
        baseline, ratio, low, high, pairs. A pair in which a time is not positive (a decode
        step is a difference of two times, and on a disturbed machine it may be) is left out.
    """
    rows = []
    for case, count in tokens.items():
        for variant in variants:
            both = [(found.get(baseline), found.get(variant)) for found in (r["seconds"].get(case, {}) for r in rounds)]
            times = [time for _, time in both if time is not None]
            if not times:
                continue
            median = statistics.median(times)
            row = {"case": case, "variant": variant, "rounds": len(times), "seconds": median}
            row["tokens_per_second"] = count / median if median > 0 else None
            pairs = [(a, b) for a, b in both if a is not None and b is not None and a > 0 and b > 0]
            if variant != baseline and pairs:
                row["ratio"], row["low"], row["high"] = paired_ratio(*zip(*pairs, strict=True))
                row["pairs"] = len(pairs)
            rows.append(row)
    return rows
