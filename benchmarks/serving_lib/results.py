# SPDX-License-Identifier: Apache-2.0
"""The file of results, one run a line, and what a run has so far in a file beside it."""

import fcntl
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import result_file


class Busy(ValueError):
    """Another run writes to the file."""


class Results:
    """JSON lines. ``save`` keeps what a run has in FILE.partial; ``finish`` makes it a line of FILE.

    A run that was killed left its FILE.partial: the next one puts it into FILE.

    Raises:
        Busy: another process has the file.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another run writes to {path}; give this one a file of its own") from None
        self.recovered = self.partial.exists()
        if self.recovered:
            self._append()

    def save(self, run: dict[str, Any]) -> None:
        scratch = self.partial.with_name(self.partial.name + ".new")
        scratch.write_text(json.dumps(without_paths(run), ensure_ascii=False) + "\n", encoding="utf-8")
        scratch.replace(self.partial)

    def finish(self, run: dict[str, Any]) -> None:
        self.save(run)
        self._append()

    def _append(self) -> None:
        """Add the line; if that was cut off before, its beginning, or all of it, is there already."""
        line = self.partial.read_bytes()
        self._file.seek(0)
        *_, last = [b"", *self._file.read().splitlines(keepends=True)]
        if last == line:
            line = b""
        elif last and line.startswith(last):
            self._file.truncate(self._file.seek(0, os.SEEK_END) - len(last))
        elif last and not last.endswith(b"\n"):
            line = b"\n" + line
        self._file.write(line)
        self._file.flush()
        self.partial.unlink()


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file of results. Raises ValueError, naming the line, for what is none."""
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            run = result_file.parse(line, f"{path}:{number}")
            if not isinstance(run, dict):
                raise ValueError(f"{path}:{number}: this is no run of serving.py")
            runs.append(run)
    return runs


def without_paths(value: Any) -> Any:
    """A value of JSON whose texts do not say where on this machine things lie."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str):
        for path, name in _PLACES:
            value = value.replace(path, name)
    return value


_PLACES = [
    (path, name)
    for path, name in (
        (sys.prefix, "<python>"),
        (sys.base_prefix, "<python>"),
        (str(Path(__file__).resolve().parents[2]), "<checkout>"),
        (os.path.expanduser("~"), "~"),
        (tempfile.gettempdir(), "<tmp>"),
    )
    if len(path) > 1
]
