# SPDX-License-Identifier: Apache-2.0
"""Installed packages that join through entry points: how they are called, and what to say of one that fails."""

import importlib
import traceback
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

#: Who calls a package: the place of an error is to be looked for in what was called.
_CALLERS = (
    Path(__file__).parent,
    Path(__file__).parent / "dispatch",
    *(Path(importlib.__file__).parent / name for name in (".", "metadata")),
)


def entries(group: str) -> list[EntryPoint]:
    """The entry points of a group, by name and package, so that every process meets them in the same order."""
    return sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.dist.name if entry.dist else ""))


def origin_of(entry: EntryPoint) -> str:
    """The package and its entry point, in words."""
    return f"{entry.dist.name} (entry point {entry.name})" if entry.dist else f"entry point {entry.name}"


def last_line(error: BaseException) -> str:
    """The last line of an error's traceback, and the place that it names: ``ImportError: no x (pkg/ops.py:3)``."""
    told = error.msg if isinstance(error, SyntaxError) else str(error)
    line = " ".join(f"{type(error).__name__}: {told}".split()).removesuffix(":")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{line} ({error.filename}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[0] != "<"]
    frames = [frame for frame in frames if Path(frame.filename).parent not in _CALLERS]
    return f"{line} ({frames[-1].filename}:{frames[-1].lineno})" if frames else line
