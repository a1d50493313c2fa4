# SPDX-License-Identifier: Apache-2.0
"""A process and all that it started."""

import contextlib
from collections.abc import Callable

import psutil

#: ``os.getpgid`` or ``os.getsid``.
LeaderOf = Callable[[int], int]


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
