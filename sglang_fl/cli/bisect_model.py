# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl bisect MODEL``: progress and output. This module imports PyTorch."""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..bisect.model import EXIT_CODES, Job, Report, Show, bisect
from ..bisect.not_judged import functions_off, said_of
from ..bisect.page import as_html
from ..bisect.report import as_data, print_report, write_bug_reports
from ..config import SettingsError
from ..device import probe
from ..dispatch.logger_manager import why_unwritable
from ..dispatch.manager import get_default_manager
from ..model_run import RunFailed
from ..model_run.processes import is_missing_directory
from ..startup import check_settings
from .arguments import make_directory

#: The default time limit of a pass, in seconds.
_LIMIT = 600.0


def run(args: argparse.Namespace) -> int:
    device, manager = probe(), get_default_manager()
    settings = check_settings(os.environ, device, manager)
    if is_missing_directory(args.model):
        raise SettingsError(f"bisect: there is no model in {args.model}")
    if unwritable := why_unwritable(args.html and str(args.html)):
        raise SettingsError(f"--html: {unwritable}")
    if off := functions_off(settings, device, manager):
        print(f"sglang-fl: {said_of(len(off))}", file=sys.stderr)
    new = args.archive is not None and not args.archive.expanduser().exists()
    archives = make_directory("--archive", args.archive).resolve() if args.archive else None
    job = Job(args.model, settings, tuple(args.server_arguments), _prompts(args), args.limit or _LIMIT, archives, off)
    begun, steps = time.monotonic(), list[tuple[str, float]]()
    try:
        with _showing(Console(stderr=True)) as show:

            def begin(step: str) -> None:
                steps.append((step, time.monotonic() - begun))
                show(step)

            report = bisect(job, begin)
            write_bug_reports(report, shlex.join(["sglang-fl", *sys.argv[1:]]))
    except RunFailed as error:
        if steps[-1][0] == "loading the model" and not Path(args.model).expanduser().exists():
            print(f"sglang-fl: there is no directory {args.model}, so SGLang takes it for a model on the Hugging Face Hub", file=sys.stderr)
        print(f"sglang-fl: {steps[-1][0]}: {error}", file=sys.stderr)
        if "the prompt " not in str(error):
            print("The last output of its process:", *error.output.strip().splitlines()[-12:], sep="\n  ", file=sys.stderr)
        return 2
    finally:
        if new and archives is not None and not any(archives.iterdir()):
            archives.rmdir()
    return _write(args, report, steps, time.monotonic() - begun)


def _prompts(args: argparse.Namespace) -> tuple[str, ...]:
    """The prompt of ``--prompt``, or the lines of ``--prompts``."""
    if args.prompts is None:
        if args.prompt is not None and not args.prompt.strip():
            raise SettingsError("--prompt: the prompt is empty")
        return (args.prompt,) if args.prompt is not None else ()
    try:
        lines = args.prompts.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--prompts: {args.prompts} cannot be read: {error}") from None
    found = tuple(line for line in lines if line.strip())
    if not found:
        raise SettingsError(f"--prompts: {args.prompts} has no prompt; write one per line")
    return found


@contextmanager
def _showing(console: Console) -> Iterator[Show]:
    """Yields a function that shows the current step: next to a spinner in a terminal, else as a line."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting")

        def show(line: str) -> None:
            progress.update(task, description=line)
            if not console.is_terminal:
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield show


def _write(args: argparse.Namespace, report: Report, steps: Sequence[tuple[str, float]], seconds: float) -> int:
    """Print the report, write the page, and return the exit code.

    Args:
        steps: each step, and the seconds before it.
    """
    if args.json:
        begun = [{"step": step, "after_s": round(before, 1)} for step, before in steps]
        print(json.dumps({**as_data(report), "seconds": round(seconds, 1), "steps": begun}, indent=2))
    else:
        width = None if sys.stdout.isatty() else 200  # a file or a pipe has no width
        print_report(report, Console(markup=False, emoji=False, highlight=False, width=width))
        print(f"\ntrials: {len(report.trials)}; loads of the model: {report.loads}; {seconds:.0f} s")
    if args.html:
        try:
            args.html.expanduser().write_text(as_html(report), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            print(f"sglang-fl: --html: {error}", file=sys.stderr)
    return EXIT_CODES[report.verdict]
