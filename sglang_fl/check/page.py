# SPDX-License-Identifier: Apache-2.0
"""The report as one self-contained HTML page."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..utils.pages import page
from .constants import FAILURES, REFUSED, SKIPPED, SPEED
from .report import number, verdict
from .results import CaseResult, Report, grouped

#: The end of a plot, as a multiple of the bound. Larger errors are drawn at its end.
_PLOT_END = 1.25


@dataclass(frozen=True)
class Strip:
    """The errors of an implementation in one dtype, as positions on a line in percent.

    Attributes:
        worst: the case nearest to its bound, shown with error, bound and the reference's error.
        dots: the errors of all cases, each divided by its own bound.
        reference: the reference's error in the worst case.
    """

    impl: str
    dtype: str
    worst: CaseResult
    dots: list[float]
    reference: float | None
    bound: float = round(100 / _PLOT_END, 1)


def _place(error: float | None, bound: float | None) -> float | None:
    return None if error is None or not bound else round(min(1.0, error / bound / _PLOT_END) * 98 + 1, 1)


def _strips(cases: list[CaseResult]) -> list[Strip]:
    """The strips of one dtype together."""
    strips = []
    for (impl, dtype), group in grouped((case for case in cases if case.used >= 0), lambda case: (case.impl, case.dtype)).items():
        worst = max(group, key=lambda case: case.used)
        dots = sorted({place for case in group if (place := _place(case.error_ulp, case.bound_ulp)) is not None})
        strips.append(Strip(impl, dtype, worst, dots, _place(worst.reference_ulp, worst.bound_ulp)))
    return [strip for group in grouped(strips, lambda strip: strip.dtype).values() for strip in group]


def _speed(cases: list[CaseResult]) -> Mapping[str, list[CaseResult]]:
    """The timed cases by shape."""
    return grouped((case for case in cases if case.check == SPEED and case.time_us is not None), lambda case: case.name)


def as_html(report: Report) -> str:
    rows = grouped(report.rows(), lambda row: row.op)
    operators: list[dict[str, Any]] = []
    for op, cases in grouped(report.cases, lambda case: case.op).items():
        checks = grouped(cases, lambda case: (case.impl, case.check))
        dtypes = list(grouped(cases, lambda case: case.dtype))
        operators.append(
            {"name": op, "rows": rows[op], "strips": _strips(cases), "speed": _speed(cases), "checks": checks, "dtypes": dtypes}
        )
    return page(
        "check",
        {"number": number},
        report=report,
        headline=verdict(report).partition("\n")[0].removeprefix(f"{report.verdict}: "),
        failures=grouped(report.notes(*FAILURES), lambda note: note[0].target),
        others=list(report.notes(REFUSED, SKIPPED)),
        operators=operators,
        failing_statuses=FAILURES,
    )
