# SPDX-License-Identifier: Apache-2.0
"""A process and all that it started."""

import contextlib
import os
import time
from collections.abc import Callable

import psutil

#: ``os.getpgid`` or ``os.getsid``.
LeaderOf = Callable[[int], int]
#: Seconds between looks at processes that are ending.
_INTERVAL = 0.1


def family_of(leader: int, leader_of: LeaderOf) -> list[psutil.Process]:
    """Every process of the group or session that a process leads: its children may outlive it, orphaned."""
    family = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if leader_of(process.pid) == leader:
                family.append(process)
    return family


def end_family(leader: int, leader_of: LeaderOf, seconds: float) -> None:
    """Kill them all, and wait up to these seconds for their end."""
    family = family_of(leader, leader_of)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=seconds)


def marked(name: str, value: str) -> list[psutil.Process]:
    """Every other process that was started with this variable: also a server that left its group and session, and its parents' end."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # another user's, or one that ends
            if process.pid != os.getpid() and process.environ().get(name) == value:
                found.append(process)
    return found


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Without zombies: containers without an init keep them."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_in_order(find: Callable[[], list[psutil.Process]], seconds: float) -> None:
    """End the running processes that are found: SIGTERM, and SIGKILL to those that still run after these seconds.

    Waits as long again for the end of the killed ones: one that hangs in a driver may not end.
    """
    try:
        _each(psutil.Process.terminate, find())
        _wait(find, seconds)
    finally:  # also after Ctrl-C
        _each(psutil.Process.kill, find())
        _wait(find, seconds)


def _wait(find: Callable[[], list[psutil.Process]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while find() and time.monotonic() < end:
        time.sleep(_INTERVAL)


def _each(do: Callable[[psutil.Process], None], processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            do(process)
