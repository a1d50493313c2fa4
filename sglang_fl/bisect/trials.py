# SPDX-License-Identifier: Apache-2.0
"""What matters: replacements are switched, and the change of log-probabilities is measured against what rounding alone does."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model_run import Replacement
from .search import NO_OPERATOR, Hypothesis, Search

Logprobs = Mapping[str, Any]

#: Two right evaluations may differ by so many times what was seen of rounding.
BEYOND = 3.0
#: The log-probabilities themselves are rounded: what is less is nothing.
_LEAST = 1e-6
#: An effect that one replacement shares is at least this part of the effect of all.
_REPRODUCES = 0.5
MOST_TRIALS = 12


@dataclass(frozen=True)
class Effect:
    """How far log-probabilities are from SGLang's own.

    Attributes:
        rms: of the batch where it is largest.
        worst: the largest change of one.
    """

    rms: float = 0.0
    worst: float = 0.0

    def is_beyond(self, noise: "Effect") -> bool:
        return self.rms > BEYOND * max(noise.rms, _LEAST) or self.worst > BEYOND * max(noise.worst, _LEAST)


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
    """What the trials show.

    Attributes:
        replacements: that change the output; empty: none was proven.
        needed: how many of them it takes.
        trials: those that were run.
        no_operator: the difference stays with everything off.
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
    """Find what is necessary and sufficient for the effect of all of them, in at most ``trials_left`` runs.

    Args:
        weights: how suspicious each is.
        whole: the effect of all together.
        measure: the effect of some.
        show: is told of each trial.
    """
    names = {str(replacement): replacement for replacement in weights}
    found = Search({name: weights[replacement] for name, replacement in names.items()}, truthful=True, pairs=True)
    found.record(set(names), True)
    found.record(set(), False)
    trials: list[Trial] = []
    while (verdict := found.verdict()) is None and len(trials) < trials_left:
        on = found.next()
        one = measure(frozenset(names[name] for name in on))
        # The cure is within the noise; a culprit has most of the effect.
        reproduces = one.is_beyond(noise) and (
            one.rms >= _REPRODUCES * whole.rms or one.worst >= _REPRODUCES * whole.worst or _is_cure(on, names)
        )
        trials.append(Trial(frozenset(names[name] for name in on), one, reproduces))
        show(trials[-1])
        found.record(on, reproduces)
    cause = verdict.cause if verdict is not None else None
    if cause is None or not cause.switches:
        return Cause((), 0, tuple(trials), no_operator=cause == NO_OPERATOR)
    return _cause(cause, names, trials)


def _is_cure(on: frozenset[str], names: Mapping[str, Replacement]) -> bool:
    """Whether most are on: then what is left beyond the noise says that those that are off are not all of the cause."""
    return 2 * len(on) > len(names)


def _cause(cause: Hypothesis, names: Mapping[str, Replacement], trials: list[Trial]) -> Cause:
    return Cause(tuple(names[name] for name in cause.switches), cause.needed, tuple(trials))


def listed(on: Collection[Replacement], every: Collection[Replacement]) -> str:
    """What is on, in words, by the shorter list."""
    off = sorted(str(one) for one in every if one not in on)
    if len(on) <= len(off):
        return "only " + (", ".join(sorted(map(str, on))) or "SGLang's own")
    return f"all but {', '.join(off)}" if off else "all"
