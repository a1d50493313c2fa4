# SPDX-License-Identifier: Apache-2.0
"""The results of a check: as data, as tables in a terminal, as a page that can be sent."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from .constants import FAILURES, NOT_RUN, OK, REFUSED, SKIPPED


@dataclass(frozen=True)
class CaseResult:
    """A case and its outcome; see :class:`sglang_fl.check.implementation.Outcome`.

    Attributes:
        output: the last that its process wrote before it crashed or hung.
    """

    op: str
    impl: str
    check: str
    name: str
    dtype: str
    status: str
    message: str = ""
    error_ulp: float | None = None
    bound_ulp: float | None = None
    reference_ulp: float | None = None
    time_ratio: float | None = None
    seconds: float | None = None
    output: str = ""


@dataclass(frozen=True)
class Row:
    """The cases of one kind of check of one implementation in one dtype.

    Attributes:
        status: ``ok``, ``refused`` or ``skipped`` if all of them are or, of those that were run, all are; else
            the first failure's.
        error_ulp, bound_ulp: of the case that comes nearest to its bound, or exceeds it most.
        reference_ulp: the reference's error in that case.
        time_ratio: the median over the cases.
    """

    op: str
    impl: str
    check: str
    dtype: str
    cases: int
    failed: int
    refused: int
    not_run: int
    status: str
    error_ulp: float | None
    bound_ulp: float | None
    reference_ulp: float | None
    time_ratio: float | None

    @property
    def result(self) -> str:
        if self.failed:
            others = f" ({self.not_run} not run)" if 0 < self.not_run < self.failed else ""
            return f"{self.status}: {(self.failed - self.not_run) or self.failed} of {self.cases}{others}"
        if self.refused:
            return REFUSED if self.refused == self.cases else f"{self.status}, {self.refused} refused"
        return self.status


@dataclass(frozen=True)
class Report:
    """Everything that was found.

    Attributes:
        not_reached: how many cases were still to come when the check was interrupted.
    """

    machine: dict[str, str]
    versions: dict[str, str]
    seed: int
    quick: bool
    seconds: float
    not_available: list[dict[str, Any]]
    cases: list[CaseResult]
    not_reached: int = 0

    def rows(self) -> list[Row]:
        groups: dict[tuple[str, str, str, str], list[CaseResult]] = {}
        for case in self.cases:
            groups.setdefault((case.op, case.impl, case.check, case.dtype), []).append(case)
        return [_row(*key, cases) for key, cases in groups.items()]

    def problems(self) -> list[str]:
        """Why the check did not pass, a sentence each; empty if it passed."""
        found = [f"{row.op} {row.impl}: {row.check} in {row.dtype}: {row.result}" for row in self.rows() if row.failed]
        ran = {(case.op, case.impl): False for case in self.cases}
        for case in self.cases:
            ran[case.op, case.impl] |= case.status not in (REFUSED, SKIPPED)
        found += [f"{op} {impl}: it refused every case, so nothing of it was checked" for (op, impl), did in ran.items() if not did]
        found += self._dtypes_refused({key for key, did in ran.items() if did})
        asked_for = (one for one in self.not_available if one.get("named"))
        found += [f"{one['op']} {one['impl']}: it was asked for, and not checked: {one['why']}" for one in asked_for]
        if self.not_reached:
            found.append(f"interrupted: {self.not_reached} of {len(self.cases) + self.not_reached} cases were not reached")
        whys = list(dict.fromkeys(one["why"] for one in self.not_available)) or ["no implementation is available"]
        return found or ([] if self.cases else [f"nothing was checked: {why}" for why in whys])

    def _dtypes_refused(self, among: set[tuple[str, str]]) -> list[str]:
        """Dtypes that an implementation is declared for, and refuses whatever it is called with."""
        refused: dict[tuple[str, str, str], bool] = {}
        for case in self.cases:
            key = case.op, case.impl, case.dtype
            refused[key] = refused.get(key, True) and case.status in (REFUSED, SKIPPED)
        return [
            f"{op} {impl}: it refused every case in {dtype}; if it does not take that dtype, say so with supported_dtypes"
            for (op, impl, dtype), every in refused.items()
            if every and (op, impl) in among
        ]

    def notes(self) -> Iterator[tuple[CaseResult, int]]:
        """One case for each way in which a row's cases were not ok, and how many more there are of it."""
        groups: dict[tuple[str, str, str, str, str], list[CaseResult]] = {}
        for case in self.cases:
            if case.status != OK:
                groups.setdefault((case.op, case.impl, case.check, case.dtype, case.status), []).append(case)
        for cases in groups.values():
            yield cases[0], len(cases) - 1

    def as_data(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "rows": [asdict(row) for row in self.rows()],
            "problems": self.problems(),
            "ok": not self.problems(),
        }


def _row(op: str, impl: str, check: str, dtype: str, cases: list[CaseResult]) -> Row:
    failures = [case for case in cases if case.status in FAILURES]
    refused = sum(case.status == REFUSED for case in cases)
    others = [case for case in cases if case.status not in (REFUSED, *FAILURES)]
    status = failures[0].status if failures else others[0].status if others else REFUSED
    compared = [case for case in cases if case.error_ulp is not None and case.bound_ulp]
    worst = max(compared, key=lambda case: (case.error_ulp or 0.0) / (case.bound_ulp or 1.0), default=None)
    ratios = [case.time_ratio for case in cases if case.time_ratio is not None]
    return Row(
        op,
        impl,
        check,
        dtype,
        len(cases),
        len(failures),
        refused,
        sum(case.status == NOT_RUN for case in cases),
        status,
        worst.error_ulp if worst else None,
        worst.bound_ulp if worst else None,
        worst.reference_ulp if worst else None,
        statistics.median(ratios) if ratios else None,
    )


def _number(x: float | None) -> str:
    if x is None:
        return "—"
    return f"{x:.3f}" if x < 1000 else f"{x:.3g}"


_COLUMNS = ("operator", "implementation", "check", "dtype", "cases", "error", "bound", "reference", "time", "result")
_LEGEND = (
    "error, bound, reference's error: in units of the last place of the dtype, at the size of the summed terms, where the error comes "
    "nearest to its bound. time: as a multiple of the reference's."
)


def _cells(row: Row) -> tuple[str, ...]:
    numbers = map(_number, (row.error_ulp, row.bound_ulp, row.reference_ulp, row.time_ratio))
    return row.op, row.impl, row.check, row.dtype, str(row.cases), *numbers, row.result


def _note(case: CaseResult, more: int) -> str:
    others = f" (and {more} more)" if more else ""
    return f"{case.op} {case.impl}, {case.check}, {case.dtype}: {case.name}: {case.message}{others}"


def _verdict(report: Report) -> str:
    problems = report.problems()
    refused = sum(case.status == REFUSED for case in report.cases)
    counted = f"{len(report.cases)} cases in {report.seconds:.0f} s, {f'{refused} refused, ' if refused else ''}seed {report.seed}"
    if not problems:
        return f"PASSED: {counted}."
    return f"FAILED: {counted}.\n" + "\n".join(f"  - {problem}" for problem in problems)


def print_report(report: Report, console: Console) -> None:
    facts = Table(title="Machine and versions", title_justify="left", show_header=False)
    for name, value in {**report.machine, **report.versions}.items():
        facts.add_row(name, value)
    console.print(facts)
    table = Table(title="Checks", title_justify="left")
    for column in _COLUMNS:
        right = column in ("cases", "error", "bound", "reference", "time")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    before: tuple[str, str] | None = None
    for row in report.rows():
        if before not in (None, (row.op, row.impl)):
            table.add_section()
        before = row.op, row.impl
        table.add_row(*_cells(row), style="bold red" if row.failed else "yellow" if row.refused == row.cases else None)
    if report.cases:
        console.print(table)
        console.print(_LEGEND, style="dim")
    if report.not_available:
        missing = Table(title="Not available on this machine, and so not checked", title_justify="left")
        for column in ("operator", "implementation", "why"):
            missing.add_column(column, overflow="fold")
        for one in report.not_available:
            missing.add_row(one["op"], one["impl"], one["why"])
        console.print(missing)
    for case, more in report.notes():
        if case.status != SKIPPED:
            console.print(_note(case, more), style="red" if case.status in FAILURES else "yellow", soft_wrap=True)
    console.print(_verdict(report), soft_wrap=True)


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1em 0 } td, th { border: 1px solid #ccc; padding: .25em .6em; text-align: left }
th { background: #f2f2f2 } .n { text-align: right; font-variant-numeric: tabular-nums } .bad { background: #fde4e4 }
.refused { background: #fdf6dc } .verdict { font-size: 1.15em; white-space: pre-line }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6em }
"""


def as_html(report: Report) -> str:
    """A page with nothing outside itself."""

    def line(cells: tuple[str, ...], tag: str = "td", style: str = "") -> str:
        made = [f"<{tag}{' class=n' if 4 <= i <= 8 and tag == 'td' else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells)]
        return f"<tr{f' class={style}' if style else ''}>{''.join(made)}</tr>"

    rows = [line(_cells(row), style="bad" if row.failed else "refused" if row.refused == row.cases else "") for row in report.rows()]
    rows += [
        f"<tr><td>{escape(one['op'])}</td><td>{escape(one['impl'])}</td><td colspan=8>not available: {escape(one['why'])}</td></tr>"
        for one in report.not_available
    ]
    facts = [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in {**report.machine, **report.versions}.items()]
    notes = [
        f"<li>{escape(_note(case, more))}{f'<pre>{escape(case.output)}</pre>' if case.output else ''}</li>" for case, more in report.notes()
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"><title>sglang-fl check</title>',
            f"<style>{_STYLE}</style></head><body>",
            "<h1>sglang-fl check</h1>",
            f'<p class="{"verdict bad" if report.problems() else "verdict"}">{escape(_verdict(report))}</p>',
            f"<table>{''.join(facts)}</table>",
            f"<table>{line(_COLUMNS, 'th')}{''.join(rows)}</table>",
            f"<p>{escape(_LEGEND)}</p>",
            f"<h2>What was not ok</h2><ul>{''.join(notes)}</ul>" if notes else "",
            "</body></html>",
        ]
    )
