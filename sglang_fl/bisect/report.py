# SPDX-License-Identifier: Apache-2.0
"""The report of ``sglang-fl bisect MODEL``: tables, JSON, and the setting to paste."""

import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree

from ..check.report import number
from ..check.results import grouped
from ..config import Settings
from ..dispatch.catalog import FUNCTIONS, LAYERS, classes_of
from ..fingerprint import versions
from ..model_run import Replacement
from ..model_run.switches import ATEN
from .findings import Finding, suspicion
from .model import EXIT_CODES, FOUND, Report
from .switches import FUNCTION, OPERATOR, Switches
from .trials import Effect, listed

_COLUMNS = ("replacement", "where", "calls", "differ", "error", "SGLang's", "worst", "mean", "result")
_LEGEND = (
    "error, SGLang's: both errors against float64 on the same inputs, in ulp, in the call with the replacement's largest error. "
    "worst, mean: the replacement's error divided by SGLang's. differ: calls whose result is not SGLang's."
)
#: Rows of a replacement in the terminal. JSON and the page have all.
_ROWS = 3


def setting(culprits: Iterable[Replacement], settings: Settings) -> str:
    """The settings that leave these to SGLang and PyTorch, to paste."""
    # Layer classes by their own names, since several may share an operator. A list of what is bound may have either name.
    by_class = [one.name for one in culprits if one.kind != ATEN and settings.oot_whitelist is None]
    switches = {_switch(one) for one in culprits if one.kind == ATEN or settings.oot_whitelist is not None}
    return Switches((), settings).exclusion(switches, by_class)


def place(lines: str) -> str:
    """Where a setting goes."""
    return "for the environment" if "=" in lines else "for the file that SGLANG_FL_CONFIG names"


def as_data(report: Report) -> dict[str, Any]:
    """For JSON, which has no infinity: its name stands for it."""
    return pytree.tree_map(lambda value: str(value) if value in (math.inf, -math.inf) else value, _data(report))


def _data(report: Report) -> dict[str, Any]:
    return {
        "model": report.model,
        "verdict": report.verdict,
        "message": report.message,
        "exit_code": EXIT_CODES[report.verdict],
        "culprits": [asdict(one) for one in report.culprits],
        "together": report.together,
        "setting": setting(report.culprits, report.settings),
        "facts": report.facts,
        "noise": asdict(report.noise) if report.noise else None,
        "effect": asdict(report.whole) if report.whole else None,
        "effect_in_graphs": asdict(report.in_graphs) if report.in_graphs else None,
        "loads": report.loads,
        "trials": [
            {"on": sorted(map(str, trial.on)), "effect": trial.effect and asdict(trial.effect), "reproduces": trial.reproduces}
            for trial in report.trials
        ],
        "not_used": report.not_used,
        "not_judged": {str(one): why for one, why in report.not_judged.items()},
        "findings": [_row(finding) for finding in report.findings],
        "suspicion": _by_switch(suspicion(report.findings, report.not_judged)),
    }


def _by_switch(weights: Mapping[Replacement, float]) -> dict[str, float]:
    """The weights of replacements by the names that they have with ``--run``. Several layer classes may share an operator."""
    found: dict[str, float] = {}
    for one, weight in weights.items():
        found[_switch(one)] = max(found.get(_switch(one), 0.0), round(weight, 3))
    return found


def _switch(one: Replacement) -> str:
    if one.kind == ATEN:
        return FUNCTION + one.name
    return OPERATOR + next((op for op in (*LAYERS, *FUNCTIONS) if one.name in classes_of(op)), one.name)


def _row(finding: Finding) -> dict[str, Any]:
    names = ("path", "batch", "phase", "rank", "calls", "differ", "error_ulp", "native_ulp", "worst", "mean", "problem", "call", "archive")
    return {"replacement": str(finding.replacement), **{name: getattr(finding, name) for name in names}}


def print_report(report: Report, console: Console) -> None:
    if report.findings:
        table = Table(title="Each call compared with SGLang's own, on the same inputs", title_justify="left")
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column in ("replacement", "where", "result") else "right", overflow="fold")
        for finding in shown(report):
            table.add_row(*_cells(finding), style="bold red" if finding.problem is not None else None)
        console.print(table)
        console.print(_LEGEND, style="dim")
    if report.whole is not None and report.noise is not None:
        trials = Table(title="Change of log-probabilities", title_justify="left")
        for column in ("on", "largest", "RMS", "result"):
            trials.add_column(column, justify="right" if column in ("largest", "RMS") else "left", overflow="fold")
        for what, effect, result in effects(report):
            trials.add_row(what, f"{effect.worst:.2g}", f"{effect.rms:.2g}", result)
        console.print(trials)
    console.print()
    console.print(f"{report.verdict.upper()}: {report.message}", soft_wrap=True)
    if report.not_used:
        console.print("\nNot compared, because it is not used:", *not_used(report), sep="\n  ", soft_wrap=True)
    if report.not_judged:
        console.print("\nNot judged:", *not_judged(report), sep="\n  ", soft_wrap=True)
    if report.culprits:
        lines = setting(report.culprits, report.settings)
        console.print(f"\nThe setting that {avoids(report)}, {place(lines)}:\n\n{lines}\n", soft_wrap=True)
        for file in report.archives:
            console.print(f"Its inputs, a script that repeats the fault, and a text for a bug report: {file}", soft_wrap=True)


def effects(report: Report) -> Iterator[tuple[str, Effect, str]]:
    """The rows of the table: what was on, the change of log-probabilities, and the result."""
    off = ", without FlagGems functions" if report.off else ""
    if report.noise is not None:
        yield "nothing; SGLang's own results rounded differently", report.noise, "noise"
    if report.whole is not None:
        yield f"all that the settings select{off}", report.whole, ""
    where = ""
    if report.in_graphs is not None:
        where = ", in graphs"
        yield f"all that the settings select{off}{where}", report.in_graphs, ""
    for trial in report.trials:
        if trial.effect is None or report.noise is None:
            continue
        result = "changes" if trial.effect.is_beyond(report.noise) else "most of the change" if trial.reproduces else "does not change"
        yield listed(trial.on, report.replacements) + where, trial.effect, result


def write_bug_reports(report: Report, command: str) -> None:
    """Add a text for the function's maintainers to each archive."""
    installed = [f"{name} {version}" for name, version in versions().items() if version]
    for finding in report.findings:
        if finding.archive is None or not Path(finding.archive).is_file():
            continue
        changes = [f"{on}: {effect.worst:.2g} {result}".rstrip() for on, effect, result in effects(report)]
        facts = [report.model, *(f"{name}: {value}" for name, value in report.facts.items())]
        parts = (
            f"{finding.replacement}, {finding.where}, call {finding.call}\n\n{finding.problem}",
            f"Inputs: {finding.inputs}",
            "They are from a model that SGLang runs. Unpack this archive and run: python repeat.py",
            _bullets("Model", facts),
            _bullets("Largest change of a log-probability, by what is on", changes),
            f"{report.verdict.upper()}: {report.message}",
            f"Command: {command}",
            _bullets("Versions", installed),
        )
        with zipfile.ZipFile(finding.archive, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("report.txt", "\n\n".join(parts) + "\n")


def _bullets(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(f"- {line}" for line in lines)])


def avoids(report: Report) -> str:
    return "avoids it" if report.verdict == FOUND else "leaves out what was found"


def not_used(report: Report) -> list[str]:
    return [f"{name}: {why}" for name, why in report.not_used.items()]


def not_judged(report: Report) -> list[str]:
    """By reason, since it may be that of all functions."""
    found = grouped(report.not_judged.items(), lambda row: row[1])
    return [f"{why}: {', '.join(one.name for one, _ in rows)}" for why, rows in found.items()]


def shown(report: Report) -> list[Finding]:
    """The worst rows of each replacement, wrong ones first."""
    rows = [finding for replacement in report.replacements for finding in report.of(replacement)[:_ROWS]]
    return sorted(rows, key=lambda finding: (finding.problem is None, -finding.used))


def _cells(finding: Finding) -> Sequence[str]:
    result = f"call {finding.call}: {finding.problem}" if finding.problem is not None else "within bounds" if finding.differ else "the same"
    numbers = (finding.error_ulp, finding.native_ulp, finding.worst or None, finding.mean or None)
    return (str(finding.replacement), finding.where, str(finding.calls), str(finding.differ), *map(number, numbers), result)
