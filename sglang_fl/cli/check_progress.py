# SPDX-License-Identifier: Apache-2.0
"""The progress of a check: a bar in a terminal, else a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..check.runner import Progress

#: Seconds between lines, where the output is no terminal.
_LINE_INTERVAL = 15.0


@contextmanager
def showing(console: Console) -> Iterator[Callable[[Progress], None]]:
    """Gives a function that shows how far the check is."""
    begun = time.monotonic()
    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            yield lambda progress: live.update(_display(progress, time.monotonic() - begun), refresh=True)
        return
    last = begun

    def line(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_INTERVAL:
            last = time.monotonic()
            longest = max(progress.running, key=lambda running: running[2], default=("", "", 0.0))
            what = f"; {longest[1]} for {longest[2]:.0f} s: {longest[0]}" if progress.running else ""
            console.print(f"{_counted(progress, last - begun)}{what}", markup=False, soft_wrap=True, highlight=False)

    yield line


def _counted(progress: Progress, seconds: float) -> str:
    return f"{progress.done} of {progress.total or '?'} cases, {seconds:.0f} s"


def _display(progress: Progress, seconds: float) -> Group:
    table = Table.grid(padding=(0, 2))
    for what, phase, since in progress.running:
        table.add_row(f"{since:.0f} s", phase, Text(what, overflow="ellipsis", no_wrap=True))
    bar = Table.grid(padding=(0, 2))
    line = ProgressBar(total=progress.total or None, completed=progress.done, width=40, pulse=not progress.total)
    bar.add_row(line, _counted(progress, seconds))
    return Group(table, bar)
