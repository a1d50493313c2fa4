# SPDX-License-Identifier: Apache-2.0
"""Finds the candidates that are faster alone and not slower in the served model: groups first, then their parts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .bench import NATIVE, Bench, Choice
from .engine import EngineFailed
from .judge import CRASHED, SLOWER_SERVED, USED, WRONG, Candidate, predicted
from .statistics import LOOKS, Speed, is_decided, speed

#: A group is split if its served gain falls short of the predicted gain by more than this part.
_DEPARTS = 0.5


def choice_of(candidates: Sequence[Candidate]) -> Choice:
    impls = {candidate.name: candidate.impl for candidate in candidates if candidate.impl is not None}
    return Choice.of(impls, [candidate.name for candidate in candidates if candidate.impl is None])


class Served:
    """Measures choices in the served model against native in the same engine.

    Args:
        noise: case -> the smallest effect that this machine can show.
        step_us: case -> native's time.
        measured: the measurement of a kind and a name, from the journal or made now. Raises when the time is used up.
    """

    def __init__(self, bench: Bench, noise: Mapping[str, float], step_us: Mapping[str, float], measured: Callable[..., Any]):
        self._bench, self._noise, self._step_us, self._measured = bench, noise, step_us, measured
        #: choice -> case -> its speed
        self.speeds: dict[Choice, dict[str, Speed]] = {}

    def settle(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the accepted candidates. Sets the status and reason of each."""
        accepted = self._accepted(list(candidates))
        while accepted and choice_of(accepted) not in self.speeds:
            try:
                if not self._slower(accepted):
                    break
                status, why = SLOWER_SERVED, f"the model is slower with it together with others: {self._shown(accepted)}"
            except EngineFailed as error:
                status, why = CRASHED, f"the engine ended with it together with others: {str(error).splitlines()[0]}"
            # It is only together: drop the one with the smallest predicted gain.
            least = min(accepted, key=lambda candidate: candidate.gain)
            least.settle(status, f"{least.reason}; but {why}")
            accepted.remove(least)
        return accepted

    def _accepted(self, group: list[Candidate]) -> list[Candidate]:
        if not group:
            return []
        try:
            slower = self._slower(group)
        except NotInForce as error:
            for candidate in group:
                if candidate.entry in error.missing:
                    candidate.settle(WRONG, f"it cannot be used in the engine: {error.missing[candidate.entry]}")
            return self._accepted([candidate for candidate in group if candidate.entry not in error.missing])
        except EngineFailed as error:
            if len(group) > 1:
                return self._halves(group)
            group[0].settle(CRASHED, f"the engine ended with it: {str(error).splitlines()[0]}")
            return []
        if slower and len(group) == 1:
            group[0].settle(SLOWER_SERVED, f"{group[0].reason}; but the model is slower with it: {slower}")
            return []
        if not slower and (len(group) == 1 or not self._departs(group)):
            for candidate in group:
                candidate.status = USED
            return group
        return self._halves(group)

    def _halves(self, group: list[Candidate]) -> list[Candidate]:
        half = len(group) // 2
        return [*self._accepted(group[:half]), *self._accepted(group[half:])]

    def _slower(self, group: Sequence[Candidate]) -> str | None:
        """The cases in which the model is slower with a group, as text. None: no case."""
        speeds = self.measure(choice_of(group))
        for candidate in group:
            candidate.served = {case: (found.ratio, found.low, found.high) for case, found in speeds.items()}
        slower = [f"{found} of native's speed in {case}" for case, found in speeds.items() if found.is_slower(self._noise[case])]
        return ", ".join(slower) or None

    def _departs(self, group: Sequence[Candidate]) -> bool:
        """Whether the model gains significantly less than the group's times alone predict."""
        promised = predicted(group, self._step_us)
        speeds = self.measure(choice_of(group))
        return any(
            speeds[case].high < 1 + _DEPARTS * (promise - 1) and promise > 1 + self._noise[case]
            for case, promise in promised.items()
            if case in speeds
        )

    def _shown(self, group: Sequence[Candidate]) -> str:
        return ", ".join(f"{case} {found}" for case, found in self.measure(choice_of(group)).items())

    def measure(self, choice: Choice) -> dict[str, Speed]:
        """Measure pairs of native and the choice until the interval decides, or until the last look."""
        if choice in self.speeds:
            return self.speeds[choice]
        pairs: list[dict[str, dict[str, float]]] = []
        found: dict[str, Speed] = {}
        for look in LOOKS:
            while len(pairs) < look:
                number = len(pairs)
                pairs.append(self._measured("pair", f"{choice}, {number}", partial(self._pair, choice, number)))
            found = {
                str(case): speed([pair["native"][str(case)] for pair in pairs], [pair["other"][str(case)] for pair in pairs])
                for case in self._bench.cases
            }
            if is_decided(found, self._noise):
                break
        self.speeds[choice] = found
        return found

    def _pair(self, choice: Choice, number: int) -> dict[str, dict[str, float]]:
        """Measure native and the choice, alternately native first and last, so that adjacent pairs need no switch."""
        sides = {"native": NATIVE, "other": choice}
        found = {}
        for side in list(sides) if number % 2 == 0 else reversed(list(sides)):
            missing = self._bench.use(sides[side])
            if missing:
                raise NotInForce(missing)
            found[side] = self._bench.round(number)
        return found


class NotInForce(RuntimeError):
    """A choice could not be used in the engine.

    Attributes:
        missing: entry -> why.
    """

    def __init__(self, missing: Mapping[str, str]):
        super().__init__("; ".join(f"{name}: {why}" for name, why in missing.items()))
        self.missing = missing
