# SPDX-License-Identifier: Apache-2.0
"""The loggers, and the dispatch log: which operator ran on what."""

import datetime
import logging
import os
from pathlib import Path

from .locks import ForkSafeLock

#: Of each line that says where layers of a class run.
PREFIX = "[OOT-DISPATCH] "


def get_logger(name: str = "sglang_fl.dispatch") -> logging.Logger:
    """A logger of sglang-fl. It writes where the process's logging writes."""
    return logging.getLogger(name)


def set_log_level(level: int | str, name: str = "sglang_fl.dispatch") -> None:
    """Set a logger's level, by number or name (``"DEBUG"``)."""
    get_logger(name).setLevel(level.upper() if isinstance(level, str) else level)


def why_unwritable(path: str | None) -> str | None:
    """Why a log file cannot be written, or None."""
    if not path:
        return None
    file = Path(path).expanduser()
    if file.exists():
        writable = not file.is_dir() and os.access(file, os.W_OK)
    else:
        writable = file.parent.is_dir() and os.access(file.parent, os.W_OK | os.X_OK)
    return None if writable else f"{str(file)!r} cannot be written"


class DispatchLog:
    """The file named by SGLANG_FL_DISPATCH_LOG: ``[OOT-DISPATCH] RMSNorm → vendor(vendor.cuda)``.

    A line is written when a layer of a class first runs on an implementation in this process, and,
    for classes left to SGLang, when that is settled. Processes share the file: lines are appended
    whole. A line that begins with ``#`` says when a process bound a model, and which.
    """

    def __init__(self, path: str | None):
        self.path = Path(path).expanduser() if path else None
        self._seen: set[tuple[str, str]] = set()
        self._lock = ForkSafeLock()

    def record(self, class_name: str, destination: str) -> None:
        """Write that layers of a class run on a destination, once per process."""
        if (class_name, destination) in self._seen:
            return
        with self._lock:
            if (class_name, destination) in self._seen:
                return
            self._seen.add((class_name, destination))
        line = f"{PREFIX}{class_name} → {destination}"
        get_logger().debug(line)
        self._write(line)

    def begin(self, model: str) -> None:
        """Write that this process binds a model from here on."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._write(f"# {now}, process {os.getpid()}: {model}")

    def _write(self, line: str) -> None:
        if self.path is not None:
            try:
                with self.path.open("ab", buffering=0) as file:
                    file.write(f"{line}\n".encode())
            except OSError as error:
                get_logger().error("the dispatch log %s cannot be written: %s", self.path, error)


def read_dispatch_log(text: str) -> list[tuple[str, str]]:
    """(class, destination) of each line of such a file, each once."""
    lines = [line.removeprefix(PREFIX).partition(" → ") for line in text.splitlines() if line.startswith(PREFIX)]
    return list(dict.fromkeys((class_name, destination) for class_name, _, destination in lines))


_open_log = DispatchLog(None)


def dispatch_log() -> DispatchLog:
    """The process's dispatch log."""
    return _open_log


def open_dispatch_log(path: str | None) -> DispatchLog:
    """Make a file the process's dispatch log; None: no file."""
    global _open_log
    _open_log = DispatchLog(path)
    return _open_log
