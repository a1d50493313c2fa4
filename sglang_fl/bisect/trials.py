# SPDX-License-Identifier: Apache-2.0
"""Trials: switch replacements and compare the change of log-probabilities with the effect of rounding."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model_run import Replacement
from .search import NO_OPERATOR, Search

Logprobs = Mapping[str, Any]

#: Two correct evaluations may differ by this many times the measured effect of rounding.
BEYOND = 3.0
#: The log-probabilities themselves are rounded. Smaller changes are ignored.
_LEAST = 1e-6
#: A trial reproduces the fault if its effect is at least this part of the whole effect.
_REPRODUCES = 0.5
MOST_TRIALS = 12


def beyond(noise: float) -> float:
    """The largest change of a log-probability that still counts as noise."""
    return BEYOND * max(noise, _LEAST)


@dataclass(frozen=True)
class Effect:
    """The difference of log-probabilities from SGLang's own.

    Attributes:
        rms: root mean square, of the batch with the largest.
        worst: the largest single difference.
    """

    rms: float = 0.0
    worst: float = 0.0

    def is_beyond(self, noise: "Effect") -> bool:
        return self.rms > beyond(noise.rms) or self.worst > beyond(noise.worst)

    def share(self, whole: "Effect", noise: "Effect") -> float:
        """This effect divided by ``whole``, by the measure (RMS or largest) in which ``whole`` is further beyond the noise."""
        if math.isinf(self.rms):
            return 1.0
        by_rms = whole.rms / beyond(noise.rms) > whole.worst / beyond(noise.worst)
        return self.rms / whole.rms if by_rms else self.worst / whole.worst


def effect(native: Logprobs, other: Logprobs) -> Effect:
    rms, worst = 0.0, 0.0
    for name, expected in native.items():
        off = np.abs(np.nan_to_num(np.asarray(other[name]) - expected, nan=math.inf, posinf=math.inf, neginf=math.inf))
        rms, worst = max(rms, float(np.sqrt(np.mean(off**2)))), max(worst, float(off.max()))
    return Effect(rms, worst)


def largest(*effects: Effect) -> Effect:
    return Effect(max(one.rms for one in effects), max(one.worst for one in effects))


@dataclass(frozen=True)
class Trial:
    """One run of the model with some replacements on."""

    on: frozenset[Replacement]
    effect: Effect
    reproduces: bool


@dataclass(frozen=True)
class Cause:
    """The conclusion from the trials.

    Attributes:
        replacements: those that change the output. Empty: none was proven.
        needed: how many of them are needed.
        trials: the trials that were run.
        no_operator: the difference remains with everything off.
    """

    replacements: tuple[Replacement, ...]
    needed: int
    trials: tuple[Trial, ...]
    no_operator: bool = False


def search(
    weights: Mapping[Replacement, float],
    whole: Effect,
    noise: Effect,
    measure: Callable[[frozenset[Replacement]], Effect],
    trials_left: int,
    show: Callable[[Trial], None],
) -> Cause:
    """Find the replacements that are necessary and sufficient for the whole effect, in at most ``trials_left`` runs.

    Args:
        weights: the prior weight of each.
        whole: the effect of all together.
        measure: measures the effect of some.
        show: called with each trial.
    """
    names = {str(replacement): replacement for replacement in weights}
    found = Search({name: weights[replacement] for name, replacement in names.items()}, truthful=True, pairs=True)
    found.record(set(names), True)
    found.record(set(), False)
    trials: list[Trial] = []
    while (verdict := found.verdict()) is None and len(trials) < trials_left:
        on = found.next()
        one = measure(frozenset(names[name] for name in on))
        # A cause has at least half of the effect. If most are on, any effect beyond the noise means that part of the cause is on.
        reproduces = one.share(whole, noise) >= _REPRODUCES or (one.is_beyond(noise) and 2 * len(on) > len(names))
        trials.append(Trial(frozenset(names[name] for name in on), one, reproduces))
        show(trials[-1])
        found.record(on, reproduces)
    cause = verdict.cause if verdict is not None else None
    if cause is None or not cause.switches:
        return Cause((), 0, tuple(trials), no_operator=cause == NO_OPERATOR)
    return Cause(tuple(names[name] for name in cause.switches), cause.needed, tuple(trials))


def listed(on: Collection[Replacement], every: Collection[Replacement]) -> str:
    """Names what is on, or what is off if that list is shorter."""
    off = sorted(str(one) for one in every if one not in on)
    if len(on) <= len(off):
        return "only " + (", ".join(sorted(map(str, on))) or "SGLang's own")
    return f"all but {', '.join(off)}" if off else "all"
