# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl tune``: runs it and prints its results."""

import argparse
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import SettingsError
from ..device import probe
from ..dispatch.logger_manager import why_unwritable
from ..fingerprint.facts import versions
from ..fingerprint.measured import changes
from ..tune.bench import NATIVE, Bench
from ..tune.engine import EngineFailed
from ..tune.journal import Journal
from ..tune.judge import UNAVAILABLE, UNDECIDED, USED, Candidate
from ..tune.page import as_html
from ..tune.profile import choice_in, write
from ..tune.served import Lengths
from ..tune.traffic import read
from ..tune.tuning import Job, Outcome, Tuning
from .tune_plan import print_plan


def run(args: argparse.Namespace) -> int:
    argv = ["--model-path", args.model, *args.server_arguments]
    on_cpu = probe().device_type == "cpu"
    batches = args.batch or ([1, 4] if on_cpu else [1, 32])
    lengths = Lengths(args.input_len or (64 if on_cpu else 1024), 16 if on_cpu else 64, args.output_len or (16 if on_cpu else 64))
    console = Console(soft_wrap=True, highlight=False)
    directory = args.out.with_suffix(".update" if args.update else ".tune")
    if args.dry_run:
        print_plan(console, Path(args.model), argv, directory)
        return 0
    _check_files(args)
    directory.mkdir(parents=True, exist_ok=True)
    traffic = hashlib.sha256(args.traffic.read_bytes()).hexdigest()[:12] if args.traffic and args.traffic.is_file() else str(args.traffic)
    head = {
        "arguments": argv,
        "lengths": vars(lengths),
        "batches": batches,
        "traffic": traffic,
        "versions": versions(),
        "update": str(args.update),
    }
    kept, measured = choice_in(args.update) if args.update else (NATIVE, {})
    journal = Journal(directory / "journal.jsonl", json.loads(json.dumps(head)), resume=args.resume)
    begun = time.monotonic()
    deadline = begun + args.budget if args.budget else None
    try:
        with Bench(argv, directory, lengths, batches) as bench:
            only = None
            if args.update:
                about = journal.measured("about", "the engine", bench.about)
                found = changes(measured, about["conditions"])
                only = frozenset([*(name for change in found for name in change.entries), *_with_new(measured, about)])
                for change in found:
                    console.print(f"{change}", markup=False)
                if not only:
                    console.print(f"{args.update} is up to date: nothing that it was measured with has changed", markup=False)
                    journal.path.unlink()
                    return 0
            entries = {name: entry for name, entry in measured.get("entries", {}).items() if only is None or name not in only}
            tuning = Tuning(
                Job(directory, deadline, args.traffic, only, kept),
                bench,
                journal,
                lambda text: console.print(f"{time.monotonic() - begun:6.0f} s  {text}{_left(tuning)}", markup=False),
                lambda path, outcome: write(path, outcome, entries),
            )
            outcome = tuning.run()
    except EngineFailed as error:
        console.print(f"the engine failed: {error}", markup=False)
        console.print(f"Its log is in {directory}. Measurements are saved; continue with --resume", markup=False)
        return 1
    finally:
        journal.close()
    return _finish(args, console, outcome, entries, journal)


def _check_files(args: argparse.Namespace) -> None:
    """Check files before the run, not after an hour. Raises SettingsError."""
    if args.traffic:
        read(args.traffic, 1 << 10)
    named = (("--out", args.out), ("--html", args.html))
    problems = [f"{option}: {problem}" for option, path in named if path and (problem := why_unwritable(str(path)))]
    if problems:
        raise SettingsError(problems)


def _with_new(measured: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """The operators with implementations that a profile does not mention."""
    entries = measured.get("entries", {})
    return [
        op
        for op, rows in about["implementations"].items()
        if any(row["impl"] not in entries.get(op, {}).get("candidates", {}) and row["why_not"] is None for row in rows)
    ]


def _left(tuning: Tuning) -> str:
    left = tuning.budget.left()
    return f" (about {left / 60:.0f} min left)" if left >= 90 else f" (about {left:.0f} s left)"


def _finish(args: argparse.Namespace, console: Console, outcome: Outcome, entries: dict[str, Any], journal: Journal) -> int:
    _print_outcome(console, outcome)
    if outcome.about:
        write(args.out, outcome, entries)
    if outcome.incomplete:
        undecided = sum(candidate.status == UNDECIDED for candidate in outcome.candidates)
        unconfirmed = "; the choice was not confirmed on fresh starts" if outcome.used != NATIVE and not outcome.confirmed else ""
        console.print(f"{outcome.incomplete}. Continue with --resume", markup=False)
        console.print(f"{undecided} candidates are undecided and stay with SGLang{unconfirmed}", markup=False)
    else:
        journal.path.replace(journal.path.with_name("finished.jsonl"))
    if outcome.why_native:
        console.print(f"SGLang's own everywhere: {outcome.why_native}", markup=False)
    if outcome.about:
        console.print(f"{args.out} was written. Use it with SGLANG_FL_CONFIG={args.out}", markup=False)
    if outcome.about.get("plain_cpu"):
        console.print("No accelerator: times are of the CPU, without graphs.")
    if args.html:
        args.html.write_text(as_html(outcome), encoding="utf-8")
    return 3 if outcome.incomplete else 0


def _print_outcome(console: Console, outcome: Outcome) -> None:
    """Print the used candidates with the time that each saves in a step, and the others by status."""
    shown: dict[str, list[Candidate]] = {}
    for candidate in sorted(outcome.candidates, key=lambda one: (one.impl is None, one.key)):
        shown.setdefault(candidate.status, []).append(candidate)
    if used := shown.pop(USED, []):
        table = Table(title="Used: time divided by native's, and µs saved in a step", title_justify="left", box=None)
        for column in ("", "time", *outcome.step_us):
            table.add_column(column, no_wrap=True, justify="right" if column else "left")
        for candidate in used:
            gains = [f"{candidate.gains[case]:.1f}" if case in candidate.gains else "" for case in outcome.step_us]
            table.add_row(candidate.key, f"{candidate.ratio[1]:.2f}" if candidate.ratio else "", *gains)
        console.print(table)
    for status, candidates in shown.items():
        if status != UNAVAILABLE:
            console.print(f"{status}: {', '.join(candidate.key for candidate in candidates)}", markup=False)
    for case, found in outcome.served.items():
        console.print(f"{case}: {found} of native's speed", markup=False)
