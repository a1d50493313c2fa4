# SPDX-License-Identifier: Apache-2.0
"""What a search by runs of a command came to: in words, as data, and the runs behind it."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from .command import CommandSearch, Run
from .search import NO_OPERATOR, NOTHING, Hypothesis, Verdict

#: Exit codes by what was found.
NOTHING_FAILS, FOUND, IS_NO_OPERATOR, CANNOT_TELL = 0, 1, 3, 4


def exit_code(verdict: Verdict | None) -> int:
    if verdict is None or verdict.cause is None:
        return CANNOT_TELL
    return {NO_OPERATOR: IS_NO_OPERATOR, NOTHING: NOTHING_FAILS}.get(verdict.cause, FOUND)


def as_data(found: CommandSearch) -> dict[str, Any]:
    verdict = found.search.verdict()
    cause = verdict.cause if verdict else None
    return {
        "verdict": said(found),
        "exit_code": exit_code(verdict),
        "switches": list(cause.switches) if cause else [],
        "odds": verdict and min(verdict.odds, 1e9),
        "exclusion": found.switches.exclusion(to_exclude(cause)) if cause and cause.switches else None,
        "record": str(found.path),
        "runs": [asdict(run) for run in found.runs],
    }


def print_verdict(found: CommandSearch, console: Console) -> None:
    """The runs, the verdict, and the setting that avoids what was found."""
    verdict = found.search.verdict()
    cause = verdict.cause if verdict else None
    console.print(_run_table(found, cause))
    console.print(said(found), soft_wrap=True)
    if cause is not None and cause.switches:
        setting = found.switches.exclusion(to_exclude(cause))
        place = "for the environment" if "=" in setting else "for the file that SGLANG_FL_CONFIG names"
        console.print(f"\nThe setting that avoids it, {place}; run the command with it once more:\n\n{setting}\n", soft_wrap=True)
    if found.runs and all(run.bound is False for run in found.runs):
        console.print(
            "No run loaded a model with sglang-fl, as far as its dispatch log tells. The settings are in the command's environment: "
            "the command must start the server itself, on this machine, and must not set SGLANG_FL_… variables of its own.",
            soft_wrap=True,
        )


def to_exclude(cause: Hypothesis) -> tuple[str, ...]:
    """The switches to leave off: of two that fail only together, one is enough."""
    return cause.switches[:1] if cause.needed > 1 else cause.switches


def said(found: CommandSearch) -> str:
    """The verdict in words."""
    verdict, count = found.search.verdict(), len(found.runs)
    if verdict is None or verdict.cause is None:
        return " ".join(_why_not_known(found))
    odds = f"odds {min(verdict.odds, 1e9):,.0f}:1 after {count} runs"
    rates = _wrong_answers(found, verdict.cause)
    if verdict.cause == NOTHING:
        return f"The command does not fail with all {len(found.switches.names)} switches on: {odds}. {rates}"
    if verdict.cause == NO_OPERATOR:
        left = "SGLang itself, the model, the collectives (SGLANG_FL_DIST_BACKEND), what a vendor's package changes (SGLANG_FL_PATCHES)"
        return f"It is no operator: the command fails with all of them off, too: {odds}. {rates} What is left: {left}, the command."
    names = " and ".join(verdict.cause.switches)
    if verdict.cause.needed > 1:
        what = f"{names} make the command fail, if both are on"
    elif len(verdict.cause.switches) > 1:
        what = f"{names} make the command fail, each alone"
    else:
        what = f"{names} makes the command fail: it does with this alone on, and does not with this alone off"
    return f"{what}: {odds}. {rates}"


def _why_not_known(found: CommandSearch) -> Iterator[str]:
    judged = [run.failed for run in found.runs if run.failed is not None]
    verdict = found.search.verdict()
    yield f"Cannot tell after {len(found.runs)} runs."
    if verdict is not None:
        yield f"The command's answers disagree too often: {judged.count(True)} of {len(judged)} runs failed, whatever was on."
    for words, size in (("all on", len(found.switches.names)), ("all off", 0)):
        answers = [run.failed for run in found.runs if len(run.on) == size and run.failed is not None]
        if answers:
            yield f"With {words}, {answers.count(True)} of {len(answers)} failed."
    (cause, likely), *_ = found.search.likeliest(1)
    if cause.switches:
        yield f"The likeliest is {' and '.join(cause.switches)} ({100 * likely:.0f} %). {_wrong_answers(found, cause)}"
    if not found.search.pairs:
        yield "Two that act together are looked for with --pairs."
    yield f"More runs: sglang-fl bisect --resume {found.path} --max-runs {2 * len(found.runs)}"


def _wrong_answers(found: CommandSearch, cause: Hypothesis) -> str:
    """How often the answers were wrong, if that is the cause."""
    told = []
    for (wrong, count), due, came in zip(found.search.wrong_answers(cause), ("pass", "fail"), ("failed", "passed"), strict=True):
        if count:
            told.append(f"{wrong} of {count} that should {due} {came}")
    return f"Of the runs, {' and '.join(told)}." if told else ""


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
