# SPDX-License-Identifier: Apache-2.0
"""Installed packages that join through entry points: how they are called, and what to say of one that fails."""

import contextlib
import logging
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

_STANDARD_LIBRARY, _OURS = Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1]
#: After so many seconds an import that has not come back is named.
_PATIENCE = 10.0
_INSTALLED = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}


def entries(group: str) -> list[EntryPoint]:
    """The entry points of a group, by name and package, so that every process meets them in the same order."""
    return sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.dist.name if entry.dist else ""))


def origin_of(entry: EntryPoint) -> str:
    """The package and its entry point, in words."""
    return f"{entry.dist.name} (entry point {entry.name})" if entry.dist else f"entry point {entry.name}"


@contextlib.contextmanager
def importing(origin: str) -> Iterator[None]:
    """While a package is imported: if that does not come back, the log says which it is."""
    told = "importing %s has not come back for %.0f s; if it hangs, mend or uninstall that package"
    timer = threading.Timer(_PATIENCE, logging.getLogger("sglang_fl").warning, (told, origin, _PATIENCE))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
    if filename.startswith("<") or file.parent in (_OURS / "utils", _OURS / "device", _OURS / "dispatch"):
        return True
    return _STANDARD_LIBRARY in file.parents and not _INSTALLED & set(file.parents)
