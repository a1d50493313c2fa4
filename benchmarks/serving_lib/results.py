# SPDX-License-Identifier: Apache-2.0
"""The file of results, one run a line, and what a run has so far in a file beside it."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import result_file

from sglang_fl.utils.files import write_whole
from sglang_fl.utils.json_lines import JsonLines


class Results:
    """JSON lines. ``save`` keeps what a run has in FILE.partial; ``finish`` makes it a line of FILE.

    A run that was killed left its FILE.partial: the next one puts it into FILE.

    Raises:
        BlockingIOError: another process has the file.
        OSError: it cannot be written.
        ValueError: it has lines that are no JSON.
    """

    def __init__(self, path: Path):
        self.path = path
        self._partial = partial_of(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = JsonLines(path)
        self.recovered = self._partial.exists()
        if self.recovered:
            self._append()

    def save(self, run: dict[str, Any]) -> None:
        write_whole(self._partial, json.dumps(without_paths(run), ensure_ascii=False))

    def finish(self, run: dict[str, Any]) -> None:
        self.save(run)
        self._append()

    def close(self) -> None:
        self._file.close()

    def _append(self) -> None:
        """Add the line, unless a process that ended before it could say so has done that."""
        run = json.loads(self._partial.read_text(encoding="utf-8"))
        if self._file.found[-1:] != [run]:
            self._file.append(run)
        if self._file.error is not None:
            raise self._file.error
        self._partial.unlink()


def partial_of(path: Path) -> Path:
    """Where a run that writes to this file keeps what it has so far."""
    return path.with_name(path.name + ".partial")


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
        for path, name in _PLACES.items():
            value = value.replace(path, name)
    return value


_PLACES = {
    sys.prefix: "<python>",
    sys.base_prefix: "<python>",
    str(Path(__file__).resolve().parents[2]): "<checkout>",
    os.path.expanduser("~"): "~",
    tempfile.gettempdir(): "<tmp>",
}
_PLACES.pop("/", None)  # a home directory may be the root
