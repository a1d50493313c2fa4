# SPDX-License-Identifier: Apache-2.0
"""Trials: switch replacements and compare the change of log-probabilities with the effect of rounding."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model_run import Replacement
from .findings import OUT_OF_BOUNDS
from .search import Search

Logprobs = Mapping[str, Any]

#: Two correct evaluations may differ by this many times the measured effect of rounding.
BEYOND = 3.0
#: The log-probabilities themselves are rounded. Smaller changes are ignored.
_LEAST = 1e-6
#: A trial within the noise still has the fault if its effect is at least this part of the whole effect.
_MOST = 0.5
MOST_TRIALS = 12
#: From this many suspects on they are tried together first: if they change nothing, none of them is tried alone.
_FEW = 3


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
    """One run of the model with some replacements on.

    Attributes:
        effect: None: the run ended with an error, a crash or a hang.
        reproduces: whether it changes the output beyond the noise, has most of a change that is barely beyond it, or ended.
    """

    on: frozenset[Replacement]
    effect: Effect | None
    reproduces: bool


@dataclass(frozen=True)
class Cause:
    """The conclusion from the trials.

    Attributes:
        parts: the faults: single replacements, each of which changes the output alone, and twos that change it only together.
        complete: with all of these off the output is right.
    """

    parts: tuple[tuple[Replacement, ...], ...] = ()
    complete: bool = False

    @property
    def replacements(self) -> tuple[Replacement, ...]:
        return tuple(one for part in self.parts for one in part)


def search(
    weights: Mapping[Replacement, float],
    whole: Effect,
    noise: Effect,
    measure: Callable[[frozenset[Replacement]], Effect],
    trials_left: int,
    show: Callable[[Trial], None],
) -> Cause:
    """Find the replacements that are together necessary and sufficient for the whole effect, in at most ``trials_left`` runs.

    Args:
        weights: the prior weight of each.
        whole: the effect of all together.
        measure: measures the effect of some.
        show: called with each trial.
    """
    names = {str(replacement): replacement for replacement in weights}
    trials = _Trials(lambda on: measure(frozenset(names[name] for name in on)), noise, whole, trials_left)
    trials.show = lambda on, *result: show(Trial(frozenset(names[name] for name in on), *result))
    trials.answers[frozenset(names)] = True
    known = {name: weights[replacement] for name, replacement in names.items()}
    suspects = [name for name, weight in known.items() if weight >= OUT_OF_BOUNDS]
    if len(suspects) >= _FEW and not trials.ask(frozenset(suspects)):
        suspects = []
    any(trials.ask(frozenset({name})) for name in suspects)  # up to the first that changes the output
    parts: list[tuple[Replacement, ...]] = []
    while (cause := _one_cause(known, trials)) is not None:
        parts.append(tuple(names[name] for name in sorted(cause)))
        for name in cause:
            del known[name]
        if any(trials.answers.get(frozenset({name})) for name in known):
            continue
        if trials.is_right(frozenset(known)):
            return Cause(tuple(parts), complete=True)
        if not trials.goes_on(frozenset(known)):
            break
        for name in suspects:
            trials.ask(frozenset({name}))
    return Cause(tuple(parts))


class _Trials:
    """The trials of a search.

    Attributes:
        answers: whether the output changes with these on.
    """

    show: Callable[[frozenset[str], Effect, bool], None]

    def __init__(self, measure: Callable[[frozenset[str]], Effect], noise: Effect, whole: Effect, left: int):
        self._measure, self._noise, self._whole, self._left = measure, noise, whole, left
        self._effects: dict[frozenset[str], Effect] = {}
        self.answers: dict[frozenset[str], bool] = {}

    def ask(self, on: frozenset[str]) -> bool | None:
        """Whether the output changes with these on. None: no trial is left."""
        if on in self.answers:
            return self.answers[on]
        if not self._left:
            return None
        self._left -= 1
        one = self._effects[on] = self._measure(on)
        # A fault alone may be just within the noise if all together are just beyond it.
        self.answers[on] = one.is_beyond(self._noise) or one.share(self._whole, self._noise) >= _MOST
        self.show(on, one, self.answers[on])
        return self.answers[on]

    def is_right(self, on: frozenset[str]) -> bool:
        """Whether the output is right with these on, which a trial with more of them on may have shown."""
        return not on or any(on <= more and not changes for more, changes in self.answers.items()) or self.ask(on) is False

    def goes_on(self, on: frozenset[str]) -> bool:
        """Look for the effect that is left with these on. False: there is none beyond the noise, or it was not measured."""
        if on not in self._effects or not self._effects[on].is_beyond(self._noise):
            return False
        self._whole = self._effects[on]
        return True


def _one_cause(weights: Mapping[str, float], trials: _Trials) -> frozenset[str] | None:
    """One, or two that are harmless alone, that change the output. There may be more. None: not found.

    Args:
        weights: all that may be on. With all of them on the output changes.
    """
    among = frozenset(weights)
    while True:
        found = Search({name: weights[name] for name in weights if name in among}, truthful=True, pairs=True)
        found.record(among, True)
        found.record(frozenset(), False)
        for on, changes in trials.answers.items():
            if changes and len(on) == 1 and on <= among:
                return on
            if on < among:
                found.record(on, changes)
        while (verdict := found.verdict()) is None:
            on = found.next()
            if (answer := trials.ask(on)) is None:
                return None
            if answer and len(on) == 1:
                return on
            found.record(on, answer)
        if verdict.cause is not None and verdict.cause.switches:
            return frozenset(verdict.cause.switches)
        # More than two are to blame. Go on in the smallest part that changes the output.
        smaller = min((on for on, changes in trials.answers.items() if changes and on < among), key=len, default=None)
        if smaller is None:
            return None
        among = smaller


def listed(on: Collection[Replacement], every: Collection[Replacement]) -> str:
    """Names what is on, or what is off if that list is shorter."""
    off = sorted(str(one) for one in every if one not in on)
    if len(on) <= len(off):
        return "only " + (", ".join(sorted(map(str, on))) or "SGLang's own")
    return f"all but {', '.join(off)}" if off else "all"
