# SPDX-License-Identifier: Apache-2.0
"""The journal of measurements, one line of JSON each. A run that is killed loses one at most."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import SettingsError
from ..utils.json_lines import JsonLines, read_lines

#: The fields of a journal's first line, and of each other one.
_FIRST: Mapping[str, type | tuple[type, ...]] = {"for": dict}
_OTHERS: Mapping[str, type | tuple[type, ...]] = {"kind": str, "key": str, "value": object, "seconds": (int, float)}


class Journal:
    """The measurements of a run, by key. The first line has their conditions.

    Args:
        head: the conditions, which must be equal for a resumed run.
        resume: use the existing measurements. Without it the file must not exist.

    Raises:
        SettingsError: the file exists and ``resume`` is off, is in use, or has other conditions.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], *, resume: bool):
        self.path, self._head = path, dict(head)
        self.seconds: dict[str, list[float]] = {}
        self._found: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = JsonLines(path)
        except BlockingIOError:
            raise SettingsError(f"{path} is in use by another run") from None
        except OSError as error:
            raise SettingsError(f"{path} cannot be written: {error.strerror}. Give another --out") from None
        except ValueError as error:
            raise SettingsError(_broken(path, error)) from None
        try:
            if self._file.found and not resume:
                raise SettingsError(f"{path} has the measurements of an earlier run: continue it with --resume, or delete the file")
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        lines = self._file.found
        _check(self.path, lines)
        _compare(self.path, lines, self._head)
        for line in lines[1:]:
            self._found[line["key"]] = line["value"]
            self.seconds.setdefault(line["kind"], []).append(line["seconds"])

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def measured(self, kind: str, name: str, measure: Callable[[], Any]) -> Any:
        """The measurement of this name, made now if missing. Measurements of one ``kind`` take about the same time."""
        key = f"{kind}: {name}"
        if key not in self._found:
            begun = time.monotonic()
            value = measure()
            seconds = time.monotonic() - begun
            if not self._found:  # not before: a run that measured nothing leaves nothing to continue
                self._write({"for": self._head})
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


def seconds_in(path: Path, arguments: Sequence[str]) -> dict[str, list[float]]:
    """Kind of measurement -> the seconds of each in a journal. Empty if the journal is of a server with other arguments."""
    lines = _read(path)
    found: dict[str, list[float]] = {}
    if lines and lines[0]["for"].get("arguments") == list(arguments):
        for line in lines[1:]:
            found.setdefault(line["kind"], []).append(line["seconds"])
    return found


def check_conditions(path: Path, head: Mapping[str, Any]) -> None:
    """Raises SettingsError if a journal has other conditions, so that no run can continue it."""
    _compare(path, _read(path), head)


def _read(path: Path) -> list[Any]:
    """The lines of a journal that may be in use. Raises SettingsError."""
    try:
        lines = read_lines(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}. Give another --out") from None
    except ValueError as error:
        raise SettingsError(_broken(path, error)) from None
    _check(path, lines)
    return lines


def _broken(path: Path, error: ValueError) -> str:
    return f"{path} cannot be read: {error}. Delete it to start again"


def _check(path: Path, lines: Sequence[Any]) -> None:
    for number, line in enumerate(lines, 1):
        fields = _FIRST if number == 1 else _OTHERS
        if not isinstance(line, dict) or not all(name in line and isinstance(line[name], kind) for name, kind in fields.items()):
            raise SettingsError(f"{path}:{number}: not a line of a journal. Delete the file to start again")


def _compare(path: Path, lines: Sequence[Any], here: Mapping[str, Any]) -> None:
    if not lines:
        return
    there = lines[0]["for"]
    other = [f"{name} was {there.get(name)} and is {here.get(name)}" for name in {**here, **there} if there.get(name) != here.get(name)]
    if other:
        raise SettingsError(f"{path} holds for something else: {'; '.join(other)}. Delete it, or give another --out")
