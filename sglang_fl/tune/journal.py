# SPDX-License-Identifier: Apache-2.0
"""Measurements as they come: a line of JSON each, so that a run that was killed loses one at most."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import SettingsError
from ..utils.json_lines import JsonLines


class Journal:
    """The measurements of a run, by key. The first line says what they hold for.

    Args:
        head: what must be the same for measurements to be used again.
        resume: use those that are there. Without it the file must not exist.

    Raises:
        SettingsError: it is there and not to be resumed, is in use, or holds for something else.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], *, resume: bool):
        if path.exists() and not resume:
            raise SettingsError(f"{path} has the measurements of an earlier run: go on with --resume, or delete it")
        self.path = path
        self.seconds: dict[str, list[float]] = {}
        self._found: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = JsonLines(path)
        except BlockingIOError:
            raise SettingsError(f"{path} is in use by another run") from None
        try:
            self._read(head)
        except BaseException:
            self._file.close()
            raise

    def _read(self, head: Mapping[str, Any]) -> None:
        lines = self._file.found
        if not lines:
            self._write({"for": dict(head)})
            return
        there = lines[0]["for"]
        other = [f"{name} was {there.get(name)} and is {value}" for name, value in head.items() if there.get(name) != value]
        if other:
            raise SettingsError(f"{self.path} holds for something else: {'; '.join(other)}. Delete it, or give another --out")
        for line in lines[1:]:
            self._found[line["key"]] = line["value"]
            self.seconds.setdefault(line["kind"], []).append(line["seconds"])

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def measured(self, kind: str, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured under this name, or is now. ``kind`` is what such measurements take about the same time for."""
        key = f"{kind}: {name}"
        if key not in self._found:
            begun = time.monotonic()
            value = measure()
            seconds = time.monotonic() - begun
            self._write({"kind": kind, "key": key, "value": value, "seconds": round(seconds, 3)})
            self._found[key] = value
            self.seconds.setdefault(kind, []).append(seconds)
        return self._found[key]

    def _write(self, line: dict[str, Any]) -> None:
        self._file.append(line)
        if self._file.error is not None:
            raise self._file.error
        self._file.sync()

    def close(self) -> None:
        self._file.close()
