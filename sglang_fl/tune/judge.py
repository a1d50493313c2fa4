# SPDX-License-Identifier: Apache-2.0
"""Candidates, their measurements, and the decision about each.

The rule: a candidate replaces native code (SGLang's or PyTorch's own) if it is right and capturable on every recorded call, alone
nowhere slower and faster in the median, saves enough of a step to matter, and is not slower in the served model. Ties stay with SGLang.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

#: Above the first ratio to native's time a call counts as slower. Below the second a median counts as faster.
MAX_RATIO, MAX_MEDIAN = 1.02, 0.98
#: The least part of a step that a candidate must save in one of the cases: a tenth of the smallest effect that any machine shows.
#: One that only other requests call cannot be weighed so.
LEAST_SHARE = 0.001
#: From this part of a step on, what a slower FlagGems function costs makes a served model slower. (The smallest effect that any machine
#: shows.)
MOST_LOST = 0.01

#: The approximate µs of any call on a device, and of each byte. They decide only the order of candidates, and which calls are tried.
_CALL_US, _BYTE_US = 2.0, 1e-6

#: Statuses of a candidate.
USED, TIE, SLOWER, WRONG, CRASHED, NOT_CALLED, OUTSIDE, UNAVAILABLE, SLOWER_SERVED, NOT_BEST, UNDECIDED, NOT_MEASURED = (
    "used",
    "tie",
    "slower",
    "wrong",
    "crashed",
    "not exercised",
    "only outside of graphs",
    "not available",
    "slower served",
    "another is faster",
    "undecided",
    "not measured",
)
#: A profile lists functions of these statuses as broken, so that `prefer: flagos` does not use them.
BROKEN = frozenset({WRONG, CRASHED})


#: A profile's entry of a FlagGems function begins with this: operators of the same name have entries, too.
FUNCTION = "flag_gems."


def rough_us(size: int) -> float:
    """The approximate time of a call with so many bytes."""
    return _CALL_US + _BYTE_US * size


@dataclass
class Candidate:
    """An implementation of an operator, or a FlagGems function.

    Attributes:
        name: the operator, or the function.
        impl: the implementation's id. None: it is a function.
        packages: those of its source.
        calls: the recorded calls that it would serve: rows of ``Live.recorded``.
        status, reason: the decision, and why.
        ratio: its time divided by native's: the smallest, median and largest of all calls.
        own_us: case -> native's µs of its calls in a step.
        gains: case -> µs that it saves per step.
        gain_bounds: case -> the sums of the ends of its calls' intervals, so an interval that is rather too wide.
        served: case -> (ratio, low, high) of the speed to native's, for the last choice with it.
    """

    name: str
    impl: str | None
    packages: Sequence[str]
    calls: list[dict[str, Any]] = field(default_factory=list)
    status: str = NOT_MEASURED
    reason: str = ""
    ratio: tuple[float, float, float] | None = None
    own_us: dict[str, float] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    gain_bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    served: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name}: {self.impl or 'flag_gems'}"

    @property
    def entry(self) -> str:
        """The name of the profile's entry that it belongs to."""
        return self.name if self.impl is not None else FUNCTION + self.name

    @property
    def gain(self) -> float:
        """µs saved per step, summed over the cases."""
        return sum(self.gains.values())

    def share_of(self, step_us: Mapping[str, float]) -> float:
        """Its calls' part of a step, roughly, in all cases together. ``step_us``: case -> native's time."""
        return sum(
            count * rough_us(call["bytes"]) / step_us[case]
            for call in self.calls
            for case, count in call["per_pass"].items()
            if case in step_us
        )

    def settle(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "calls"}


@dataclass(frozen=True)
class Timed:
    """The times of one call: on the device in a replayed graph, or on the host outside of graphs.

    Attributes:
        own_us: native's time.
        ratio: the candidate's time divided by native's: (median, low, high).
    """

    call: Mapping[str, Any]
    own_us: float
    ratio: tuple[float, float, float]


def timed(call: Mapping[str, Any], own: Mapping[str, Any], theirs: Mapping[str, Any], in_graph: bool) -> Timed | tuple[str, str]:
    """The relevant part of two timings (see :class:`~sglang_fl.tune.timing.Timing`), or the candidate's status and why there is none."""
    if own.get("error"):
        return UNDECIDED, f"timing native failed: {own['error']}"
    if theirs.get("error"):
        return UNDECIDED if "out of memory" in theirs["error"] else WRONG, f"timing it failed: {theirs['error']}"
    on_host = own.get("host_us") is not None and (own.get("uncaptured") or not in_graph)
    us, ratio = ("host_us", "host_ratio") if on_host else ("us", "ratio")
    if own.get(us) is None or not theirs.get(ratio):
        return UNDECIDED, "it could not be timed"
    return Timed(call, float(own[us]), tuple(theirs[ratio]))


def judge_alone(candidate: Candidate, rows: Sequence[Timed], step_us: Mapping[str, float], outside: bool = False) -> bool:
    """Whether a candidate alone is nowhere slower, faster in the median, and saves enough of a step. Otherwise its status says why not.

    Args:
        step_us: case -> native's time of a step.
        outside: whether it is in force outside of the model's forward, too, as in sampling.
    """
    ratios = [row.ratio for row in rows]
    medians = [ratio[0] for ratio in ratios]
    candidate.ratio = (min(medians), float(np.median(medians)), max(medians))
    lost = []
    for case in step_us:
        labels = (case, f"{case} outside") if outside else (case,)
        own = [row.own_us * sum(row.call["per_pass"].get(label, 0.0) for label in labels) for row in rows]
        saved, most, least = (sum((1 - row.ratio[i]) * us for row, us in zip(rows, own, strict=True)) for i in range(3))
        if any(own):
            candidate.own_us[case], candidate.gains[case], candidate.gain_bounds[case] = sum(own), saved, (least, most)
        if saved < (1 - MAX_RATIO) * sum(own):
            lost.append(f"{-saved:.3g} µs slower in a step of {case}")
    shares = {case: saved / step_us[case] for case, saved in candidate.gains.items()}
    slowest = max((row for row in rows if row.ratio[0] > MAX_RATIO and row.ratio[1] > 1), key=lambda row: row.ratio[0], default=None)
    figures = f"{candidate.ratio[1]:.3g} times native's time in the median ({min(medians):.3g} to {max(medians):.3g})"
    if slowest is not None:
        slower = f"{slowest.ratio[0]:.3g} times native's time ({slowest.call['call']})"
        least, case = min(((share, case) for case, share in shares.items()), default=(0.0, ""))
        if candidate.impl is None and least <= -MOST_LOST:
            candidate.settle(SLOWER_SERVED, f"{slower}, which costs {-100 * least:.2g} % of a step of {case}")
        else:
            candidate.settle(SLOWER, slower)
    elif candidate.ratio[1] > MAX_MEDIAN or not any(ratio[2] < 1 for ratio in ratios):
        candidate.settle(TIE, f"{figures}: no measurable gain")
    elif lost:
        candidate.settle(TIE, f"{figures}, and {' and '.join(lost)}")
    elif shares and (most := max(shares.values())) < LEAST_SHARE:
        candidate.settle(TIE, f"{figures}, but that saves only {100 * max(most, 0.0):.2g} % of a step")
    else:
        candidate.reason = figures
        return True
    return False


def predicted(candidates: Sequence[Candidate], step_us: Mapping[str, float]) -> dict[str, float]:
    """The ratio to native's speed that follows from the candidates' times alone, by case."""
    found = {}
    for case, us in step_us.items():
        saved = sum(candidate.gains.get(case, 0.0) for candidate in candidates)
        found[case] = us / max(us - saved, 0.1 * us)
    return found
