# SPDX-License-Identifier: Apache-2.0
"""A report in a terminal."""

from rich.console import Console

from ..utils.tables import table
from .constants import FAILURES, REFUSED
from .results import FAILED, CaseResult, Report, Row, grouped

_NUMBERS = ("cases", "error", "bound", "reference", "time", "compiling")
_LEGEND = (
    "error, bound, reference's error: in units of the last place of the dtype, at the size of the summed terms, where the error is "
    "nearest to its bound. time: as a multiple of the reference's. compiling: all first calls together, which may compile or tune."
)


def number(x: float | None) -> str:
    if x is None:
        return "—"
    return f"{x:.3f}" if 0.001 <= x < 1000 or not x else f"{x:.3g}"


def verdict(report: Report) -> str:
    """One line, and a line for each problem."""
    counts = {"failed": sum(row.failed for row in report.rows()), "refused": sum(row.refused for row in report.rows())}
    told = "".join(f"{count} {what}, " for what, count in counts.items() if count)
    scope = f"{'quick, ' if report.quick else ''}seed {report.seed}"
    counted = f"{len(report.cases)} cases in {report.seconds:.0f} s, {told}{scope}"
    lines = [f"{report.verdict}: {counted}.", *(f"  - {problem}" for problem in report.problems())]
    if report.not_reached:
        lines.append(f"  - {report.not_reached} cases were not run")
    return "\n".join(lines)


def note(case: CaseResult, more: int) -> str:
    others = f" (and {more} more)" if more else ""
    return f"{case.op} {case.impl}, {case.check}, {case.dtype}: {case.name}: {case.message}{others}"


def print_report(report: Report, console: Console) -> None:
    facts = table("Machine and versions", "", "", show_header=False)
    for name, value in {**report.machine, **report.versions}.items():
        facts.add_row(name, value)
    console.print(facts)
    checks = table("Checks", "operator", "implementation", *_NUMBERS, "result", right=_NUMBERS)
    for row in report.rows():
        checks.add_row(*_cells(row), style="bold red" if row.failed else "yellow" if row.result == REFUSED else None)
    if report.rows():
        console.print(checks)
        console.print(_LEGEND, style="dim")
    if report.not_available:
        missing = table("Not checked, as they are not available on this machine", "operator", "implementation", "why")
        for target in report.not_available:
            missing.add_row(target.op, target.impl, target.why)
        console.print(missing)
    for case, more in report.notes(REFUSED):
        console.print(f"refused: {note(case, more)}", style="yellow", soft_wrap=True)
    for notes in grouped(report.notes(*FAILURES), lambda note: note[0].target).values():
        case, more = notes[0]
        kinds = f"; also failed: {', '.join(f'{case.check} {case.dtype}' for case, _ in notes[1:])}" if notes[1:] else ""
        console.print(f"{FAILED}: {note(case, more)}{kinds}", style="red", soft_wrap=True)
        console.print(f"  again: {report.repeat(case)}", soft_wrap=True)
        if case.archive:
            console.print(f"  inputs: {case.archive}", soft_wrap=True)
    console.print(verdict(report), soft_wrap=True)


def _cells(row: Row) -> tuple[str, ...]:
    worst = row.worst
    numbers = map(number, (*((worst.error_ulp, worst.bound_ulp, worst.reference_ulp) if worst else (None,) * 3), row.time_ratio))
    cases = str(row.cases) if row.done == row.cases else f"{row.done} of {row.cases}"
    return row.op, row.impl, cases, *numbers, f"{row.compiling_s:.0f} s", row.result
