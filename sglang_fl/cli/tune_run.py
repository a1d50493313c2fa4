# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl tune``: runs it and prints its results."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..config import CONFIG_FILE, SettingsError, config_files
from ..device import probe
from ..dispatch.logger_manager import why_unwritable
from ..dispatch.manager import get_default_manager
from ..fingerprint.facts import versions
from ..fingerprint.measured import chip_name, driver
from ..tune.baseline import Baseline, read_baseline
from ..tune.bench import NATIVE, Bench, StartFailed, with_profile
from ..tune.engine import EngineFailed
from ..tune.journal import Journal, check_conditions
from ..tune.judge import CRASHED, OUTSIDE, SLOWER_SERVED, UNAVAILABLE, UNDECIDED, USED, WRONG, Candidate
from ..tune.merge import labels, merge
from ..tune.outcome import Outcome
from ..tune.page import as_html
from ..tune.profile import as_text, write
from ..tune.served import Lengths
from ..tune.traffic import read
from ..tune.tuning import Job, Tuning
from ..utils.files import write_whole
from ..utils.packages import sources_of
from ..utils.suggest import suggest
from .tune_plan import print_plan

#: Statuses that are printed with their reasons.
_EXPLAINED = (WRONG, CRASHED, SLOWER_SERVED, OUTSIDE, UNDECIDED)

_SAVED = "Measurements are saved; continue with --resume"


def run(args: argparse.Namespace) -> int:
    if args.merge:
        return _merge(args)
    if not args.model:
        raise SettingsError("name the MODEL to tune (sglang-fl tune --help)")
    argv = ["--model-path", args.model, *args.server_arguments]
    on_cpu = probe().device_type == "cpu"
    batches = args.batch or ([1, 4] if on_cpu else [1, 32])
    lengths = Lengths(args.input_len or (64 if on_cpu else 1024), 16 if on_cpu else 64, args.output_len or (16 if on_cpu else 64))
    console = Console(soft_wrap=True, highlight=False)
    args.out = args.out or args.update or Path("profile.yaml")
    _check_files(args)
    directory = _directory(args)
    saved = directory / "baseline.yaml"
    beginning = saved if args.resume and saved.is_file() else args.update
    baseline = read_baseline(beginning, "--update") if args.update else Baseline()
    head = json.loads(json.dumps({"arguments": argv, "lengths": vars(lengths), "batches": batches, **_conditions(args, beginning)}))
    record = directory / "journal.jsonl"
    if args.dry_run:
        if args.resume and record.is_file():
            check_conditions(record, head)
        print_plan(console, Path(args.model), argv, directory, resume=args.resume, update=args.update)
        return 0
    journal = Journal(record, head, resume=args.resume)
    begun = time.monotonic()
    deadline = begun + args.budget if args.budget else None
    try:
        if args.update and beginning != saved:
            saved.write_bytes(args.update.read_bytes())  # --out may be the same file, and has less until the end
        with Bench(argv, directory, lengths, batches) as bench:
            if args.update:
                about = journal.measured("about", "the engine", bench.about)
                baseline = _to_measure(console, baseline, about)
                if baseline.is_confirmed and not (baseline.only or baseline.new_functions):
                    more = f", so {args.html} was not written" if args.html else ""
                    console.print(f"{args.update} is up to date: nothing that it was measured with has changed{more}", markup=False)
                    _forget(journal, saved)
                    return 0
            tuning = Tuning(
                Job(directory, deadline, args.traffic, baseline),
                bench,
                journal,
                lambda text: console.print(f"{time.monotonic() - begun:6.0f} s  {text}{_left(tuning)}", markup=False),
                lambda path, outcome: write(path, outcome, baseline),
            )
            outcome = tuning.run()
    except (EngineFailed, StartFailed) as error:
        console.print(f"the engine failed: {_without_usage(str(error))}", markup=False)
        console.print(f"Its log is in {directory}{f'. {_SAVED}' if journal.seconds else ''}", markup=False)
        return 1
    except KeyboardInterrupt:
        if journal.seconds:
            print(_SAVED, file=sys.stderr)
        raise
    except SettingsError:
        if not journal.seconds.keys() - {"about"}:  # such as another model's profile: nothing to continue
            _forget(journal, saved)
        raise
    finally:
        journal.close()
    return _finish(args, console, outcome, baseline, journal)


def _merge(args: argparse.Namespace) -> int:
    if args.out is None or os.path.realpath(args.out) in map(os.path.realpath, args.merge):
        raise SettingsError("--merge takes the profiles, and --out with another file for the sum")
    if problem := _why_unwritable(args.out, beside=True):
        raise SettingsError(f"--out: {problem}")
    found = merge(args.merge)
    names = ", ".join(labels(args.merge))
    write_whole(args.out, as_text(f"# The sum of the profiles {names}, by sglang-fl tune --merge\n", found))
    used = [op for op, order in found["op_backends"].items() if order != ["sglang"]] + found["flagos_faster"]
    print(f"{args.out} was written. In use: {', '.join(used) or 'nothing'}")
    return 0


def _directory(args: argparse.Namespace) -> Path:
    """The folder for the files that a resumed run needs. Raises SettingsError if it cannot be used."""
    name = args.out.name.removesuffix(".yaml").removesuffix(".yml")
    directory: Path = args.out.absolute().with_name(name + (".update" if args.update else ".tune"))
    if directory.exists() and not directory.is_dir():
        raise SettingsError(f"{directory} is a file, and tune needs a folder of this name: move it, or give another --out")
    if args.resume and (directory / "finished.jsonl").is_file() and not (directory / "journal.jsonl").is_file():
        raise SettingsError(f"--resume: the run in {directory} has ended. To measure again, leave out --resume")
    return directory


def _conditions(args: argparse.Namespace, baseline: Path | None) -> dict[str, Any]:
    """What must be the same when a run is resumed, beside the arguments."""

    def content(path: Path | None) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path and path.is_file() else str(path)

    device, manager = probe(), get_default_manager()
    manager.ensure_initialized()
    return {
        "traffic": content(args.traffic),
        "model's configuration": content(Path(args.model) / "config.json"),
        "versions": versions(),
        **sources_of(["flag_gems", *(impl.module for impl in manager.registry.implementations())]),
        "chip": chip_name(device) if torch.accelerator.is_available() else device.device_type,
        "driver": driver(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SGLANG_FL_") or name == "USE_FLAGGEMS"},
        "settings files": [content(path) for name in config_files(os.environ) if (path := Path(name).expanduser()) != args.out],
        "update": str(args.update),
        "profile to update": content(baseline),
    }


def _to_measure(console: Console, baseline: Baseline, about: Mapping[str, Any]) -> Baseline:
    """The profile, with what of it is measured again."""
    found = baseline.changes(about)
    for change in found:
        console.print(f"{change}", markup=False)
    only = frozenset([*(name for change in found for name in change.entries), *baseline.not_measured(about)])
    every = any(len(change.entries) == len(baseline.entries) for change in found)
    return replace(baseline, only=only, new_functions=every or any(change.what.endswith("flag_gems") for change in found))


def _without_usage(error: str) -> str:
    """What an engine says of its end. If it refused the server's arguments, without SGLang's usage text, which is pages long."""
    first, *lines = error.splitlines()
    told = [line for line in lines if ": error: " in line]
    return "\n".join([f"{first}: it refused the server's arguments", *told]) if "SystemExit: 2" in first and told else error


def _forget(journal: Journal, saved: Path) -> None:
    journal.path.unlink(missing_ok=True)
    saved.unlink(missing_ok=True)


def _check_files(args: argparse.Namespace) -> None:
    """Check files before the run, not after an hour. Raises SettingsError."""
    model = Path(args.model)
    if args.model.startswith(("/", ".", "~")) and not os.path.exists(os.path.expanduser(args.model)):
        siblings = [path.name for path in model.parent.iterdir()] if model.parent.is_dir() else []
        raise SettingsError(f"there is no model {args.model!r}{suggest(model.name, siblings)}")
    if args.traffic:
        read(args.traffic, 1 << 31)
    if args.update:
        read_baseline(args.update, "--update")
    named = (("--out", args.out, True), ("--html", args.html, False))
    problems = [f"{option}: {why}" for option, path, beside in named if path and (why := _why_unwritable(path, beside=beside))]
    if problems:
        raise SettingsError(problems)


def _why_unwritable(path: Path, *, beside: bool) -> str | None:
    """Why a file cannot be written, or None. ``beside``: other files are written to its folder, and then take its place."""
    shown, folder = f"{str(path)!r} cannot be written", path.absolute().parent
    try:
        if path.exists() and not path.is_file() and (beside or path.is_dir()):
            return f"{shown}: it is a folder or a device: name a file"
        if not folder.is_dir():
            return f"{shown}: there is no folder {str(folder)!r}"
        if beside or not path.exists():
            with TemporaryDirectory(prefix=".sglang-fl-", dir=folder):  # permissions say nothing of a folder such as /proc
                pass
        return why_unwritable(str(path))
    except OSError as error:
        return f"{shown}: {error.strerror}"


def _left(tuning: Tuning) -> str:
    left, budget_ends = tuning.budget.left()
    words = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    return f" (the budget ends in {words})" if budget_ends else f" (about {words} left)"


def _finish(args: argparse.Namespace, console: Console, outcome: Outcome, baseline: Baseline, journal: Journal) -> int:
    _print_outcome(console, outcome)
    for name, why in outcome.dropped.items():
        console.print(f"dropped: {name}: {why}", markup=False)
    if outcome.about:
        write(args.out, outcome, baseline)
    if outcome.incomplete:
        if any(candidate.status == UNDECIDED for candidate in outcome.candidates):
            console.print("What is undecided stays with SGLang")
        if outcome.used != NATIVE and not outcome.confirmed:
            console.print("The choice was not confirmed on fresh starts")
        console.print(f"{outcome.incomplete}. {'Continue with --resume' if journal.seconds else 'Give a longer --budget'}", markup=False)
    else:
        journal.path.replace(journal.path.with_name("finished.jsonl"))
        journal.path.with_name("baseline.yaml").unlink(missing_ok=True)
    if outcome.why_native:
        console.print(f"SGLang's own everywhere: {outcome.why_native}", markup=False)
    if outcome.about:
        console.print(f"{args.out} was written. Use it with {CONFIG_FILE}={with_profile(args.out)}", markup=False)
    if outcome.about.get("plain_cpu"):
        console.print("No accelerator: times are of the CPU, without graphs.")
    if args.html:
        if outcome.about:
            args.html.write_text(as_html(outcome), encoding="utf-8")
        else:
            console.print(f"{args.html} was not written: no engine was started, so there is nothing to report", markup=False)
    return 3 if outcome.incomplete else 0


def _print_outcome(console: Console, outcome: Outcome) -> None:
    """Print the used candidates with the time that each saves in a step, the others by status, and what serving shows."""
    shown: dict[str, list[Candidate]] = {}
    for candidate in sorted(outcome.candidates, key=lambda one: (one.impl is None, one.key)):
        shown.setdefault(candidate.status, []).append(candidate)
    if used := shown.pop(USED, []):
        table = Table(title="Used: time alone divided by native's, and the µs of a step that this saves", title_justify="left", box=None)
        for column in ("", "time", *outcome.step_us):
            table.add_column(column, no_wrap=True, justify="right" if column else "left")
        for candidate in used:
            gains = [f"{candidate.gains[case]:.1f}" if case in candidate.gains else "" for case in outcome.step_us]
            table.add_row(candidate.key, f"{candidate.ratio[1]:.2f}" if candidate.ratio else "", *gains)
        sums = [sum(candidate.gains.get(case, 0.0) for candidate in used) for case in outcome.step_us]
        table.add_row("together", "", *(f"{us:.1f}" for us in sums))
        table.add_row("native's step", "", *(f"{us:.0f}" for us in outcome.step_us.values()))
        console.print(table)
    for status, candidates in shown.items():
        if status in _EXPLAINED:
            reasons: dict[str, list[Candidate]] = {}
            for candidate in candidates:
                reasons.setdefault(candidate.reason, []).append(candidate)
            for reason, alike in reasons.items():
                console.print(f"{status}: {_names(alike)}\n    {reason}", markup=False)
        elif status != UNAVAILABLE:
            console.print(f"{status}: {_names(candidates)}", markup=False)
    if outcome.served:
        console.print("Served, with all that is used:")
    for case, found in outcome.served.items():
        console.print(f"  {case}: {found.in_words(outcome.noise[case])}", markup=False)
    if outcome.confirmed:
        console.print("On fresh starts:")
        for case in outcome.confirmed.speeds:
            console.print(f"  {case}: {outcome.confirmed.in_words(case)}", markup=False)


def _names(candidates: Sequence[Candidate]) -> str:
    """Implementations by operator, then FlagGems functions."""
    names: dict[str, list[str]] = {}
    for candidate in candidates:
        group, name = ("flag_gems", candidate.name) if candidate.impl is None else (candidate.name, candidate.impl)
        names.setdefault(group, []).append(name)
    return "; ".join(f"{group}: {', '.join(found)}" for group, found in names.items())
