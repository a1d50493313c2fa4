# SPDX-License-Identifier: Apache-2.0
"""The report of a search with --run: verdict, table of runs, and JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from .command import CommandSearch, Run
from .search import NO_OPERATOR, NOTHING, Hypothesis, Verdict

#: Exit codes.
NOTHING_FAILS, FOUND, IS_NO_OPERATOR, CANNOT_TELL = 0, 1, 3, 4
#: The verdicts in JSON. A report of MODEL has the same, but "no difference" where nothing fails.
_KEYWORDS = {NOTHING_FAILS: "nothing fails", FOUND: "found", IS_NO_OPERATOR: "no operator", CANNOT_TELL: "undecided"}


def exit_code(verdict: Verdict | None) -> int:
    if verdict is None or verdict.cause is None:
        return CANNOT_TELL
    return {NO_OPERATOR: IS_NO_OPERATOR, NOTHING: NOTHING_FAILS}.get(verdict.cause, FOUND)


def as_data(found: CommandSearch) -> dict[str, Any]:
    verdict = found.search.verdict()
    cause = verdict.cause if verdict else None
    return {
        "verdict": _KEYWORDS[exit_code(verdict)],
        "message": said(found),
        "exit_code": exit_code(verdict),
        "switches": list(cause.switches) if cause else [],
        "odds": verdict and min(verdict.odds, 1e9),
        "exclusion": found.switches.exclusion(to_exclude(cause)) if cause and cause.switches else None,
        "record": str(found.path),
        "runs": [asdict(run) for run in found.runs],
    }


def print_verdict(found: CommandSearch, console: Console) -> None:
    """Print the runs, the verdict, and the setting that avoids the fault."""
    verdict = found.search.verdict()
    cause = verdict.cause if verdict else None
    console.print(_run_table(found, cause))
    console.print(said(found), soft_wrap=True)
    if cause is not None and cause.switches:
        setting = found.switches.exclusion(to_exclude(cause))
        place = "for the environment" if "=" in setting else "for the file that SGLANG_FL_CONFIG names"
        console.print(f"\nThe setting that avoids it, {place}. Run the command with it once more:\n\n{setting}\n", soft_wrap=True)
    if unbound := [str(run.run) for run in found.runs if run.bound is False]:
        which = "No run" if len(unbound) == len(found.runs) else f"{'Run' if len(unbound) == 1 else 'Runs'} {', '.join(unbound)}: nothing"
        console.print(
            f"{which} loaded a model with sglang-fl: there is no dispatch log. The command must start the server itself in each run, on "
            "this machine, pass its environment on, and set no SGLANG_FL_… variables.",
            soft_wrap=True,
        )


def to_exclude(cause: Hypothesis) -> tuple[str, ...]:
    """The switches to turn off. Of two that fail only together, one is enough."""
    return cause.switches[:1] if cause.needed > 1 else cause.switches


def said(found: CommandSearch) -> str:
    """The verdict in words."""
    verdict, count = found.search.verdict(), len(found.runs)
    if verdict is None or verdict.cause is None:
        return " ".join(_why_not_known(found))
    odds = f"odds {min(verdict.odds, 1e9):,.0f}:1 after {_runs(count)}"
    rates = _wrong_answers(found, verdict.cause)
    if verdict.cause == NOTHING:
        return f"The command does not fail with all {len(found.switches.names)} switches on: {odds}. {rates}"
    if verdict.cause == NO_OPERATOR:
        left = "SGLang itself, the model, the collectives (SGLANG_FL_DIST_BACKEND), changes by a vendor's package (SGLANG_FL_PATCHES)"
        return f"It is no operator: the command also fails with all switches off: {odds}. {rates} Other causes: {left}, the command."
    names = " and ".join(verdict.cause.switches)
    if verdict.cause.needed > 1:
        what = f"{names} make the command fail when both are on"
    elif len(verdict.cause.switches) > 1:
        what = f"{names} make the command fail, each alone"
    else:
        what = f"{names} makes the command fail: it fails with only this on, and passes with only this off"
    return f"{what}: {odds}. {rates}"


def _why_not_known(found: CommandSearch) -> Iterator[str]:
    judged = [run.failed for run in found.runs if run.failed is not None]
    verdict = found.search.verdict()
    yield f"Undecided after {_runs(len(found.runs))}."
    if verdict is not None:
        yield f"The results do not depend on the switches: {judged.count(True)} of {len(judged)} runs failed."
    for words, size in (("all on", len(found.switches.names)), ("all off", 0)):
        answers = [run.failed for run in found.runs if len(run.on) == size and run.failed is not None]
        if answers:
            yield f"With {words}, {answers.count(True)} of {len(answers)} failed."
    (cause, likely), *_ = found.search.likeliest(1)
    if cause.switches:
        yield f"Most likely: {' and '.join(cause.switches)} ({100 * likely:.0f} %). {_wrong_answers(found, cause)}"
    if not found.search.pairs:
        yield "--pairs also looks for two switches that act together."
    yield f"More runs: {found.resume} --max-runs {2 * len(found.runs)}"


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _wrong_answers(found: CommandSearch, cause: Hypothesis) -> str:
    """How many results were wrong if this is the cause."""
    wrong_answers = []
    for (wrong, count), due, came in zip(found.search.wrong_answers(cause), ("pass", "fail"), ("failed", "passed"), strict=True):
        if count:
            wrong_answers.append(f"{wrong} of {count} that should {due} {came}")
    return f"Of the runs, {' and '.join(wrong_answers)}." if wrong_answers else ""


def _run_table(found: CommandSearch, cause: Hypothesis | None) -> Table:
    table = Table("run", "on", title=f"Runs of {found.command}", title_justify="left")
    suspects = cause.switches if cause is not None else ()
    for column in (*suspects, "answer", "how it ended", "time", "output"):
        table.add_column(column, overflow="fold")
    for run in found.runs:
        states = ("on" if switch in run.on else "off" for switch in suspects)
        count = f"{len(run.on)} of {len(found.switches.names)}"
        table.add_row(str(run.run), count, *states, answer(run), run.how, f"{run.seconds:.0f} s", run.output)
    return table


def answer(run: Run) -> str:
    return {True: "failed", False: "passed", None: "not judged"}[run.failed]
