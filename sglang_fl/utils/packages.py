# SPDX-License-Identifier: Apache-2.0
"""Installed packages that join through entry points: finding them, naming them, and saying why one failed."""

import contextlib
import hashlib
import importlib.util
import logging
import sysconfig
import threading
import traceback
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path

from .suggest import suggest

_STANDARD_LIBRARY, _OURS = Path(sysconfig.get_path("stdlib")), Path(__file__).parents[1]
#: An import that takes longer is named in the log.
_SLOW_IMPORT_SECONDS = 10.0
_INSTALLED = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}


def installed_version(package: str) -> str | None:
    """As its metadata states it; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_of(module: str) -> str:
    """The package whose source decides what a module computes: its outermost one; of sglang-fl's own modules, their folder."""
    return module.rpartition(".")[0] if module.startswith("sglang_fl.") else module.partition(".")[0]


def source_files(package: str) -> list[Path]:
    """The files with code of an installed package, or of a module; none where there is no such."""
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return []
    files = {Path(spec.origin)}
    for folder in spec.submodule_search_locations or ():
        files |= {file for file in Path(folder).rglob("*") if file.suffix in (".py", ".so")}
    return sorted(file for file in files if file.exists())


def source_hash(package: str) -> str:
    """Changes with any line of a package's source."""
    found, files = hashlib.sha256(), source_files(package)
    for file in files:
        found.update(
            f"{file.relative_to(files[0].parent) if files[0].parent in file.parents else file.name}\n".encode() + file.read_bytes()
        )
    return found.hexdigest()[:12]


def sources_of(modules: Iterable[str]) -> dict[str, str]:
    """``source of PACKAGE`` -> its :func:`source_hash`, for the packages of functions' modules."""
    return {f"source of {package}": source_hash(package) for package in sorted(set(map(package_of, modules))) if package}


def entries(group: str) -> list[EntryPoint]:
    """The entry points of a group, by name and package, so that every process meets them in the same order."""
    return sorted(entry_points(group=group), key=lambda entry: (entry.name, entry.dist.name if entry.dist else ""))


def origin_of(entry: EntryPoint) -> str:
    """The package and its entry point, for messages."""
    return f"{entry.dist.name} (entry point {entry.name})" if entry.dist else f"entry point {entry.name}"


@contextlib.contextmanager
def importing(origin: str) -> Iterator[None]:
    """Around the import of a package: a warning names it if that takes long."""
    message = "importing %s has taken %.0f s so far; if it hangs, fix or uninstall that package"
    timer = threading.Timer(_SLOW_IMPORT_SECONDS, logging.getLogger("sglang_fl").warning, (message, origin, _SLOW_IMPORT_SECONDS))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def last_line(error: BaseException) -> str:
    """The error and where it was raised in the package, in one line: ``ImportError: no x (pkg/ops.py:3)``."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    line = " ".join(f"{type(error).__name__}: {message}".split()).removesuffix(":")
    if isinstance(error, SyntaxError) and error.filename:
        return f"{line} ({error.filename}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours_or_pythons(frame.filename)]
    return f"{line} ({frames[-1].filename}:{frames[-1].lineno})" if frames else line


def nearest(error: BaseException) -> str:
    """The nearest name that there is, where a module or a class lacks one."""
    if isinstance(error, AttributeError) and error.name and error.obj is not None:
        return suggest(error.name, [name for name in dir(error.obj) if name.startswith("__") == error.name.startswith("__")])
    return ""


def _is_ours_or_pythons(filename: str) -> bool:
    """Whether a file belongs to Python or to sglang-fl, and not to the package that was called."""
    file = Path(filename)
    ours = [_OURS / name for name in ("check", "cli/doctor", "device", "dispatch", "platform", "utils")]
    if filename.startswith("<") or file.parent in ours:
        return True
    return _STANDARD_LIBRARY in file.parents and not _INSTALLED & set(file.parents)
