# SPDX-License-Identifier: Apache-2.0
"""Find the operator that changes a model's output."""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..bisect.command import CommandFailed, CommandSearch
from ..bisect.command_report import answer, as_data, exit_code, print_verdict
from ..bisect.switches import Switches, switches_in_force
from ..config import SettingsError
from ..device import probe
from ..dispatch.manager import get_default_manager
from ..startup import check_settings
from .arguments import Parser, duration, make_directory, number

_RUNS = number(int, lambda count: count > 0, "a number of runs above 0")
_MOST_RUNS = 40
#: With one switch to blame, few searches take longer: with answers of which 5 % are wrong, one in ten takes more than 22 runs.
_MANY_RUNS = 20
_RECORD = "runs.jsonl"
_EXIT_CODES = """exit codes: 0 nothing fails, no difference; 1 found; 2 wrong usage, or the command or the model cannot be run;
3 it is no operator; 4 undecided; 130 interrupted"""


def add_arguments(parser: Parser) -> None:
    parser.epilog = _EXIT_CODES
    parser.takes_server_arguments = True
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a directory, or a name that SGLang downloads; server arguments go after --"
    )
    models = parser.add_argument_group("with MODEL")
    prompts = models.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="a prompt with a wrong output; default: a few general ones")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="a file with one prompt per line")
    models.add_argument("--html", type=Path, metavar="FILE", help="write the report as an HTML page")
    models.add_argument(
        "--archive", type=Path, metavar="DIR", help="write the inputs of wrong calls to DIR, with a script that repeats them"
    )
    runs = parser.add_argument_group("with a command and its exit code")
    runs.add_argument(
        "--run",
        metavar="CMD",
        help="a shell command that starts the server and judges it: exit code 0 good, 125 cannot be judged, others bad",
    )
    parser.add_argument(
        "--limit",
        type=duration,
        metavar="TIME",
        help="a run (default: 1h), or a pass of MODEL (default: 10m), that takes longer counts as hanging",
    )
    runs.add_argument("--max-runs", type=_RUNS, metavar="N", help=f"give up after this many runs (default: {_MOST_RUNS})")
    runs.add_argument("--pairs", action="store_true", help="also look for two switches that act together; takes about twice as many runs")
    runs.add_argument("--report", type=Path, metavar="FILE", help="what MODEL --json printed: what differs there is suspected first")
    runs.add_argument("--out", type=Path, metavar="DIR", help="a folder for the record and the runs' output (default: ./bisect-DATE)")
    runs.add_argument("--resume", type=Path, metavar="FILE", help=f"continue a search from its record, DIR/{_RECORD}")
    runs.add_argument("--dry-run", action="store_true", help="show the switches and their settings, and run nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.run is not None and not args.run.strip():
        raise SettingsError("--run: the command is empty")
    by_command = args.run is not None or args.resume is not None
    if args.model is not None and by_command:
        raise SettingsError("bisect: give either MODEL or --run 'CMD', which starts its own server, not both")
    if args.model is not None:
        _refuse(args, "--run", "report", "out", "max_runs", "pairs", "dry_run")
        from . import bisect_model  # PyTorch takes seconds

        return bisect_model.run(args)
    if not by_command:
        raise SettingsError("bisect: give MODEL, or --run 'CMD', a command that exits with 0 if the answers are good, or --resume FILE")
    _refuse(args, "MODEL", "prompt", "prompts", "html", "archive")
    if args.server_arguments:
        raise SettingsError("bisect: server arguments after -- go with MODEL; the command of --run has its own")
    return _by_command(args)


def _refuse(args: argparse.Namespace, needed: str, *options: str) -> None:
    """Refuse options that do nothing without ``needed``."""
    for name in options:
        if getattr(args, name) not in (None, False):
            raise SettingsError(f"bisect: --{name.replace('_', '-')} goes with {needed}")


def _by_command(args: argparse.Namespace) -> int:
    device, manager = probe(), get_default_manager()
    switches = switches_in_force(check_settings(os.environ, device, manager), device, manager)
    if not switches.names:
        raise SettingsError(
            f"bisect: nothing to search: these settings leave every operator to SGLang on {device.vendor}; see sglang-fl ops"
        )
    if args.dry_run:
        _check_command(args.run)
        return _dry_run(switches)
    suspicion = _suspicion(args.report) if args.report is not None else None
    path = _record_path(args)
    search = CommandSearch(path, switches, args.run, args.limit, pairs=args.pairs, suspicion=suspicion)
    console = Console(stderr=True, markup=False, highlight=False)
    try:
        _search(search, args.max_runs or _MOST_RUNS, console)
    except CommandFailed as error:
        console.print(f"sglang-fl: {error}\nsglang-fl: continue with: {search.resume}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print(f"sglang-fl: the finished runs are saved; continue with: {search.resume}", soft_wrap=True)
        raise
    finally:
        search.close()
    if args.json:
        print(json.dumps(as_data(search), indent=2))
    else:
        # A file or a pipe has no width.
        print_verdict(search, Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160))
    return exit_code(search.search.verdict())


def _suspicion(path: Path) -> dict[str, float]:
    try:
        found = {name: float(weight) for name, weight in json.loads(path.expanduser().read_text(encoding="utf-8"))["suspicion"].items()}
        if all(0 < weight < math.inf for weight in found.values()):
            return found
    except OSError as error:
        raise SettingsError(f"--report: {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise SettingsError(f"--report: {path} is no report of sglang-fl bisect MODEL --json")


def _record_path(args: argparse.Namespace) -> Path:
    if args.resume is not None:
        path: Path = args.resume.expanduser()
        if path.is_dir():
            path /= _RECORD
        if args.out is not None:
            raise SettingsError("--out: not allowed with --resume, which writes into the folder of its file")
        if args.report is not None:
            raise SettingsError("--report: not allowed with --resume; give it to a new search")
        if not path.is_file():
            raise SettingsError(f"--resume: there is no file {str(path)!r}")
        return path
    path = make_directory("--out", args.out or Path(time.strftime("bisect-%Y-%m-%d-%H%M%S"))) / _RECORD
    if path.exists() and path.stat().st_size:
        raise SettingsError(f"--out: {path} exists; --resume {shlex.quote(str(path))} continues it")
    return path


def _search(found: CommandSearch, most: int, console: Console) -> None:
    """Run the command until there is a verdict or --max-runs is reached."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    while found.search.verdict() is None and len(found.runs) < most:
        on = found.search.next()
        what = f"run {len(found.runs) + 1}: {len(on)} of {len(found.switches.names)} on"
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            progress.add_task(what)
            last = found.step(on)
        (cause, likely), *_ = found.search.likeliest(1)
        suspect = f"; likeliest: {' and '.join(cause.switches)}, {100 * likely:.0f} %" if cause.switches and likely > 0.05 else ""
        console.print(f"{what}: {answer(last)} ({last.how}, {last.seconds:.0f} s){suspect}", soft_wrap=True)
        if len(found.runs) == _MANY_RUNS and found.search.verdict() is None and not found.search.pairs:
            console.print(
                f"A single switch is seldom still unknown after {_MANY_RUNS} runs: two may act together. "
                f"To look for pairs in these runs too: Ctrl-C, and then {found.resume} --pairs",
                soft_wrap=True,
            )


def _check_command(command: str | None) -> None:
    """Refuse a command that the shell does not find. Of one that begins with more than a name nothing is known."""
    found = re.match(r"\s*([\w./+-]+)(?=\s|$)", command or "")
    if found and subprocess.run(["sh", "-c", 'command -v -- "$1"', "sh", found[1]], stdout=subprocess.DEVNULL).returncode:
        raise SettingsError(f"--run: the shell does not find {found[1]!r}")


def _dry_run(switches: Switches) -> int:
    """Print the switches and the settings that a search would use."""
    half = frozenset(switches.names[::2])
    print(f"{len(switches.names)} switches: {' '.join(switches.names)}\n")
    for words, on in (("all on", frozenset(switches.names)), ("all off", frozenset[str]()), ("every other one on, as an example", half)):
        changed = [f"{name}={value!r}" if value is not None else f"(without {name})" for name, value in switches.environ(on).items()]
        print(f"{words}: {' '.join(changed) or '(your settings)'}")
    return 0
