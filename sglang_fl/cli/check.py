# SPDX-License-Identifier: Apache-2.0
"""Check implementations: their results against float64, and their behaviour against the contract."""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..check.report import Report, as_html, print_report
from ..check.runner import Job, WorkerFailed, check
from ..config import SettingsError, suggest
from ..device import canonical, probe
from ..dispatch.logger_manager import why_unwritable
from ..dispatch.manager import get_default_manager
from ..dispatch.registry import OpRegistry
from ..startup import check_settings
from ..utils.signals import interrupt_on_termination
from .arguments import number

_SECONDS = number(float, lambda seconds: 0 < seconds < float("inf"), "a number of seconds above 0")
#: Each case adds to the seed, and PyTorch's generator takes 64 bits.
_SEED = number(int, lambda seed: 0 <= seed < 2**62, "an integer from 0 to 2**62 - 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", metavar="OP", help="check this operator (may be given again; default: all)")
    parser.add_argument("--impl", action="append", metavar="ID", help="check this implementation, as vendor.cuda (may be given again)")
    parser.add_argument("--vendor", action="append", metavar="NAME", help="check this vendor's implementations (may be given again)")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller shapes")
    parser.add_argument("--timeout", type=_SECONDS, default=60.0, metavar="S", help="time limit for each case (default: 60)")
    parser.add_argument("--seed", type=_SEED, metavar="N", help="seed of the random inputs, to repeat an earlier run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as an HTML page")


def targets(registry: OpRegistry, ops: list[str] | None, impls: list[str] | None, vendors: list[str] | None) -> list[tuple[str, str]]:
    """The selected (operator, implementation id) pairs: those of ``impls`` and of ``vendors``, or else all.

    Raises:
        SettingsError: an unknown name, or names that select nothing together.
    """
    every = [impl for op in registry.list_operators() for impl in registry.get_implementations(op)]
    wanted_vendors = {canonical(name) for name in vendors or ()}
    problems = [
        *_unknown("--op", "operator", ops, {impl.op_name for impl in every}),
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


def _unknown(option: str, what: str, names: Iterable[str] | None, valid: set[str]) -> list[str]:
    return [f"{option}: there is no {what} {name!r}{suggest(name, valid)}" for name in names or () if name not in valid]


def run(args: argparse.Namespace) -> int:
    manager = get_default_manager()
    check_settings(os.environ, probe(), manager)
    chosen = targets(manager.registry, args.op, args.impl, args.vendor)
    unwritable = why_unwritable(args.html and str(args.html))
    if unwritable:
        raise SettingsError(f"--html: {unwritable}")
    seed = secrets.randbits(31) if args.seed is None else args.seed
    interrupt_on_termination()
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("starting", total=None)
            report = check(
                Job(chosen, args.quick, seed, args.timeout, named=bool(args.impl)),
                lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
            )
    except WorkerFailed as error:
        print(f"sglang-fl: {error}", file=sys.stderr)
        return 1
    unwritten = _write_page(args.html, report) if args.html else None
    if args.json:
        # Escaped: messages come from implementations, and this terminal may not be able to encode them.
        print(json.dumps(report.as_data(), indent=2))
    else:
        # A file or a pipe has no width, and the table has ten columns.
        width = None if sys.stdout.isatty() else 200
        print_report(report, Console(markup=False, emoji=False, highlight=False, width=width))
    if unwritten:
        print(f"sglang-fl: --html: {unwritten}", file=sys.stderr)
    if report.not_reached:
        print("sglang-fl: interrupted", file=sys.stderr)
        return 130
    return 1 if report.problems() or unwritten else 0


def _write_page(file: Path, report: Report) -> OSError | None:
    """Write the HTML page; an error is returned, so that the report is still printed."""
    try:
        file.expanduser().write_text(as_html(report), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        return error
    return None
