# SPDX-License-Identifier: Apache-2.0
"""The results of a check, as data. Does not need PyTorch."""

import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from .constants import FAILURES, NOT_RUN, OK, REFUSED, SKIPPED, case_name

PASSED, FAILED, INCOMPLETE = "PASSED", "FAILED", "INCOMPLETE"
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        status: see ``constants``.
        message: why, if it is not ok.
        error_ulp, bound_ulp: see :class:`~sglang_fl.check.exact.judge.Verdict`.
        reference_ulp: the reference's error in the same case.
        time_us, reference_us: the time of a call and of the reference's, in microseconds.
    """

    status: str = OK
    message: str = ""
    error_ulp: float | None = None
    bound_ulp: float | None = None
    reference_ulp: float | None = None
    time_us: float | None = None
    reference_us: float | None = None

    @property
    def used(self) -> float:
        """The error divided by its bound. -1: there is none."""
        return self.error_ulp / self.bound_ulp if self.error_ulp is not None and self.bound_ulp else -1.0


@dataclass(frozen=True, kw_only=True)
class CaseResult(Outcome):
    """A case of an implementation, and its outcome.

    Attributes:
        seconds, compiling_s: its time, and the part of first calls, which may compile or tune.
        output: the last output of its process before it crashed or hung.
        archive: the file with its inputs, if one was written.
    """

    op: str
    impl: str
    check: str
    name: str
    dtype: str
    seconds: float = 0.0
    compiling_s: float = 0.0
    output: str = ""
    archive: str = ""

    @property
    def target(self) -> tuple[str, str]:
        return self.op, self.impl

    @property
    def key(self) -> tuple[str, str]:
        """What tells a case from the others of a run."""
        return self.full_name, self.impl

    @property
    def full_name(self) -> str:
        return case_name(self.op, self.check, self.name, self.dtype)


@dataclass(frozen=True)
class Target:
    """An implementation of an operator.

    Attributes:
        cases: the number of its cases.
        why: why it cannot run here.
        named: it was requested by name, so it is a failure if it cannot run here.
    """

    op: str
    impl: str
    cases: int
    why: str | None = None
    named: bool = False


@dataclass(frozen=True)
class Row:
    """The cases of one implementation.

    Attributes:
        status: ``ok``, or the first failure's; ``refused`` or ``skipped`` if all cases are.
        worst: the case nearest to its bound, or furthest beyond it.
        time_ratio: its time divided by the reference's, the median over the shapes.
        compiling_s: the seconds of all first calls, which may compile or tune.
    """

    op: str
    impl: str
    cases: int
    done: int
    failed: int
    not_run: int
    refused: int
    status: str
    worst: CaseResult | None
    time_ratio: float | None
    compiling_s: float

    @property
    def result(self) -> str:
        if not self.done:
            return "not reached"
        if self.failed:
            others = f" ({self.not_run} not run)" if 0 < self.not_run < self.failed else ""
            return f"{self.status}: {(self.failed - self.not_run) or self.failed} of {self.done}{others}"
        if self.refused:
            return REFUSED if self.refused == self.done else f"{self.status}, {self.refused} refused"
        return self.status


@dataclass(frozen=True)
class Report:
    """All results.

    Attributes:
        date: the start, in ISO 8601.
        only: the words that selected the cases.
        seconds: the total time of all parts.
    """

    machine: dict[str, str]
    versions: dict[str, str]
    date: str
    seed: int
    quick: bool
    only: list[str]
    targets: list[Target]
    cases: list[CaseResult]
    seconds: float

    @property
    def not_available(self) -> list[Target]:
        return [target for target in self.targets if target.why is not None]

    @property
    def not_reached(self) -> int:
        return sum(target.cases for target in self.targets) - len(self.cases)

    @property
    def verdict(self) -> str:
        return FAILED if self.problems() else INCOMPLETE if self.not_reached else PASSED

    def rows(self) -> list[Row]:
        groups = grouped(self.cases, lambda case: case.target)
        return [_row(target, groups.get((target.op, target.impl), [])) for target in self.targets if target.cases]

    def failed_kinds(self) -> list[str]:
        """A sentence for each implementation and kind of check with failures."""
        found = []
        for (op, impl, check, dtype), cases in grouped(self.cases, lambda case: (case.op, case.impl, case.check, case.dtype)).items():
            row = _row(Target(op, impl, len(cases)), cases)
            if row.failed:
                found.append(f"{op} {impl}: {check} in {dtype}: {row.result}")
        return found

    def other_problems(self) -> list[str]:
        """Problems other than failed cases."""
        found = [] if self.not_reached else list(self._always_refused())
        asked_for = (target for target in self.not_available if target.named)
        found += [f"{target.op} {target.impl}: requested by name, but not checked: {target.why}" for target in asked_for]
        whys = list(dict.fromkeys(str(target.why) for target in self.not_available)) or ["no implementation is available"]
        return found or ([] if self.rows() else [f"nothing was checked: {why}" for why in whys])

    def problems(self) -> list[str]:
        """Why the check did not pass, one sentence each. Empty if it passed or is incomplete."""
        return self.failed_kinds() + self.other_problems()

    def _always_refused(self) -> Iterator[str]:
        """Implementations, and declared dtypes of one, that refused every call."""
        none_ran = {REFUSED, SKIPPED}
        for (op, impl), cases in grouped(self.cases, lambda case: case.target).items():
            if {case.status for case in cases} <= none_ran:
                yield f"{op} {impl}: it refused every case, so nothing was checked"
                continue
            for dtype, some in grouped(cases, lambda case: case.dtype).items():
                if {case.status for case in some} <= none_ran:
                    yield f"{op} {impl}: it refused every case in {dtype}; if it does not take that dtype, say so with supported_dtypes"

    def notes(self, *statuses: str) -> Iterator[tuple[CaseResult, int]]:
        """One case for each kind of failure with these statuses, and the number of further ones."""
        chosen = (case for case in self.cases if case.status in statuses)
        for cases in grouped(chosen, lambda case: (case.op, case.impl, case.check, case.dtype, case.status)).values():
            yield cases[0], len(cases) - 1

    def repeat(self, case: CaseResult) -> str:
        """The command that runs one case again."""
        return f"sglang-fl check --impl {case.impl} --seed {self.seed} --case '{case.full_name}'"

    def as_data(self) -> dict[str, Any]:
        more = {"verdict": self.verdict, "ok": self.verdict == PASSED, "not_reached": self.not_reached}
        rows = [{**asdict(row), "worst": row.worst and row.worst.full_name} for row in self.rows()]
        return {**more, "problems": self.problems(), **asdict(self), "rows": rows}


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _row(target: Target, cases: list[CaseResult]) -> Row:
    failures = [case.status for case in cases if case.status in FAILURES]
    refused = sum(case.status == REFUSED for case in cases)
    others = {case.status for case in cases} - {REFUSED, *FAILURES}
    ratios = [case.time_us / case.reference_us for case in cases if case.time_us and case.reference_us]
    return Row(
        target.op,
        target.impl,
        target.cases,
        len(cases),
        len(failures),
        failures.count(NOT_RUN),
        refused,
        failures[0] if failures else OK if OK in others else SKIPPED if others else REFUSED,
        max((case for case in cases if case.used >= 0), key=lambda case: case.used, default=None),
        statistics.median(ratios) if ratios else None,
        sum(case.compiling_s for case in cases),
    )
