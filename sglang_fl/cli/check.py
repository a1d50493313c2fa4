# SPDX-License-Identifier: Apache-2.0
"""Check implementations: their results against float64, and their behaviour against the contract."""

import argparse
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from ..check.certificates import directory
from ..check.page import as_html
from ..check.record import Record
from ..check.report import print_report
from ..check.results import PASSED, Report
from ..check.runner import Job, WorkerFailed, check
from ..config import SettingsError, suggest
from ..device import canonical, probe
from ..dispatch.kernel_implementations import names_of
from ..dispatch.logger_manager import why_unwritable
from ..dispatch.manager import get_default_manager
from ..dispatch.registry import OpRegistry
from ..startup import check_settings
from .arguments import duration, make_directory, number
from .check_progress import showing

#: Each case adds to the seed, and PyTorch's generator takes 64 bits.
_SEED = number(int, lambda seed: 0 <= seed < 2**62, "an integer from 0 to 2**62 - 1")
_WORKERS = number(int, lambda count: 0 < count < 1000, "a number of processes from 1 to 999")
_EXIT_CODES = """exit codes: 0 PASSED; 1 FAILED, or a result could not be written; 2 wrong usage;
3 INCOMPLETE: the budget was used up, --resume continues; 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXIT_CODES
    again = "(repeatable)"
    parser.add_argument("--op", action="append", metavar="OP", help=f"check this operator or SGLang kernel {again}; default: all")
    parser.add_argument("--impl", action="append", metavar="ID", help=f"check this implementation, as vendor.cuda {again}")
    parser.add_argument("--vendor", action="append", metavar="NAME", help=f"check this vendor's implementations {again}")
    parser.add_argument("--case", action="append", metavar="WORDS", help=f"run the cases whose names have all these words {again}")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller shapes")
    parser.add_argument("--seed", type=_SEED, metavar="N", help="seed of the random inputs, to repeat an earlier run")
    parser.add_argument("--timeout", type=duration, default=60.0, metavar="TIME", help="how long a call may take (default: 60s)")
    parser.add_argument(
        "--compile-timeout", type=duration, default=300.0, metavar="TIME", help="how long a first call may compile and tune (default: 5m)"
    )
    parser.add_argument("--jobs", type=_WORKERS, metavar="N", help="processes in parallel (default: all processors but two, 2 to 16)")
    parser.add_argument("--budget", type=duration, default=float("inf"), metavar="TIME", help="stop after this time, such as 9m")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="write each result to FILE; skip the cases that FILE already has")
    out = "save the result in FILE; without FILE, where 'doctor' and 'ops' find it"
    parser.add_argument("--out", type=Path, nargs="?", const=Path(), metavar="FILE", help=out)
    parser.add_argument("--failures", type=Path, metavar="DIR", help="write failing cases' inputs to DIR, with a script that repeats them")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as an HTML page")


def targets(registry: OpRegistry, ops: list[str] | None, impls: list[str] | None, vendors: list[str] | None) -> list[tuple[str, str]]:
    """The selected (operator, implementation id) pairs: those of ``impls`` and of ``vendors``, or else all.

    Raises:
        SettingsError: an unknown name, or names that select nothing together.
    """
    every = [impl for op in registry.list_operators() for impl in registry.get_implementations(op)]
    # A SGLang kernel is also found by its bare name, without its module.
    ops = [full for name in ops for full in _named(name, registry.list_operators())] if ops else None
    wanted_vendors = {canonical(name) for name in vendors or ()}
    problems = [
        *_unknown("--op", "operator", ops, {name for impl in every for name in names_of(impl.op_name)}),
        *_unknown("--impl", "implementation", impls, {impl.impl_id for impl in every}),
        *_unknown("--vendor", "vendor", sorted(wanted_vendors), {canonical(impl.vendor) for impl in every if impl.vendor}),
    ]
    if problems:
        raise SettingsError(problems)
    found = [
        (impl.op_name, impl.impl_id)
        for impl in every
        if (not ops or impl.op_name in ops)
        and (not (impls or vendors) or impl.impl_id in (impls or ()) or (impl.vendor and canonical(impl.vendor) in wanted_vendors))
    ]
    # A name that selects nothing would be missing from the report without a message.
    names = [*(impls or ()), *(vendors or ())]
    without = [op for op in ops or () if op not in {op for op, _ in found}]
    problems = [f"check: {op} has no implementation {', '.join(names)}" for op in without]
    problems += [f"check: {impl} has no {', '.join(ops or ())}" for impl in impls or () if impl not in {impl for _, impl in found}]
    if problems:
        raise SettingsError(problems)
    return found


def _named(name: str, ops: Iterable[str]) -> list[str]:
    """The operators and kernels of this name, or the name itself if there are none."""
    return [op for op in ops if name in names_of(op)] or [name]


def _unknown(option: str, what: str, names: Iterable[str] | None, valid: set[str]) -> list[str]:
    return [f"{option}: there is no {what} {name!r}{suggest(name, valid)}" for name in names or () if name not in valid]


def run(args: argparse.Namespace) -> int:
    manager = get_default_manager()
    check_settings(os.environ, probe(), manager)
    chosen = targets(manager.registry, args.op, args.impl, args.vendor)
    if unwritable := why_unwritable(args.html and str(args.html)):
        raise SettingsError(f"--html: {unwritable}")
    if args.failures:
        make_directory("--failures", args.failures)
    out = _out_path(args)
    path = args.resume.expanduser() if args.resume else out
    record = Record(path)
    finished = True
    try:
        if record.header is None or _selects(args) or record.report().not_reached:
            job = _job(args, chosen, record)
            with showing(Console(stderr=True)) as progress:
                finished = check(job, record, progress)
        else:
            print(f"sglang-fl: nothing was run: {path} has every result", file=sys.stderr)
    except WorkerFailed as error:
        print(f"sglang-fl: {error}", file=sys.stderr)
        return 1
    finally:
        record.close()
    if record.header is None:
        if not finished:
            raise KeyboardInterrupt
        print("sglang-fl: the budget was used up before the first case", file=sys.stderr)
        return 3
    unwritten = [_kept(out, path)] if out and path else []
    return _report(args, record, finished, unwritten)


def _kept(out: Path, path: Path) -> str:
    """Save the result; returns why that failed, or an empty string."""
    try:
        if out != path:
            shutil.copyfile(path, out)
    except OSError as error:
        return f"--out: {error}"
    print(f"sglang-fl: result saved in {out}", file=sys.stderr)
    return ""


def _out_path(args: argparse.Namespace) -> Path | None:
    """Where the result is kept at the end."""
    if args.out is None:
        return None
    if args.out == Path():
        return make_directory("--out", directory()) / time.strftime("%Y-%m-%d-%H%M%S.jsonl")
    path: Path = args.out.expanduser()
    if path.exists() and path.stat().st_size:
        raise SettingsError(f"--out: {path} exists; --resume {path} continues it")
    return path


def _selects(args: argparse.Namespace) -> bool:
    return any((args.op, args.impl, args.vendor, args.case, args.quick, args.seed is not None))


def _job(args: argparse.Namespace, chosen: list[tuple[str, str]], record: Record) -> Job:
    """The run that was asked for; a resumed run keeps the arguments that are not given again."""
    then = record.header or {"targets": [], "only": [], "quick": False, "seed": secrets.randbits(31)}
    if then["targets"] and not (args.op or args.impl or args.vendor):
        chosen = [(target["op"], target["impl"]) for target in then["targets"]]
    return Job(
        chosen,
        args.quick or then["quick"],
        then["seed"] if args.seed is None else args.seed,
        args.timeout,
        args.compile_timeout,
        args.case or then["only"],
        named=bool(args.impl) or any(target["named"] for target in then["targets"]),
        workers=args.jobs,
        budget=args.budget,
        archives=args.failures and args.failures.expanduser(),
    )


def _report(args: argparse.Namespace, record: Record, finished: bool, unwritten: list[str]) -> int:
    """Print the report, write the page, and return the exit code; ``unwritten``: what could not be written so far."""
    report = record.report()
    if args.html and (error := _write_page(args.html, report)):
        unwritten.append(f"--html: {error}")
    if record.problem:
        unwritten.append(f"the results could not be written: {record.problem}")
    unwritten = list(filter(None, unwritten))
    if args.json:
        # Escaped: messages come from implementations, and this terminal may not be able to encode them.
        print(json.dumps(report.as_data(), indent=2))
    else:
        # A file or a pipe has no width.
        width = None if sys.stdout.isatty() else 200
        print_report(report, Console(markup=False, emoji=False, highlight=False, width=width))
    for message in unwritten:
        print(f"sglang-fl: {message}", file=sys.stderr)
    if not finished:
        print("sglang-fl: interrupted", file=sys.stderr)
        return 130
    if report.not_reached:
        return 3
    return 1 if report.verdict != PASSED or unwritten else 0


def _write_page(file: Path, report: Report) -> OSError | None:
    """Write the HTML page; an error is returned, so that the report is still printed."""
    try:
        file.expanduser().write_text(as_html(report), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        return error
    return None
