# SPDX-License-Identifier: Apache-2.0
"""Installed packages that join through entry points: how they are called, and what to say of one that fails."""

import sysconfig
import traceback
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

_STANDARD_LIBRARY, _OURS = Path(sysconfig.get_path("stdlib")), Path(__file__).parent
_INSTALLED = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}


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
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_a_caller(frame.filename)]
    return f"{line} ({frames[-1].filename}:{frames[-1].lineno})" if frames else line


def _is_a_caller(filename: str) -> bool:
    """Whether a file is Python's or ours, and not of the package that was called."""
    file = Path(filename)
    if filename.startswith("<") or file.parent in (_OURS, _OURS / "dispatch"):
        return True
    return _STANDARD_LIBRARY in file.parents and not _INSTALLED & set(file.parents)
