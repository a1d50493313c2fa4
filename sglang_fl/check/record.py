# SPDX-License-Identifier: Apache-2.0
"""Record: the results of a run, each written to a file at once, so that an interrupted run can continue.

The file has one JSON object per line: first the job, the machine and the versions, then each case's result.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import SettingsError
from ..utils.json_lines import JsonLines, read_lines
from .results import CaseResult, Report, Target

_FORMAT = 1


class Record:
    """The results of a run.

    Args:
        path: the file, which is continued if it exists. None: results are only kept in memory.

    Attributes:
        header: the job, machine and versions. None before ``begin``.
        cases: the results, by the case's full name and the implementation.
        seconds: the total time of all runs, until the last result.
        problem: the last error when writing the file.

    Raises:
        SettingsError: the file is not one of these, is in use, or cannot be opened.
    """

    def __init__(self, path: Path | None = None):
        self.header: dict[str, Any] | None = None
        self.cases: dict[tuple[str, str], CaseResult] = {}
        self.seconds = self._earlier = 0.0
        self._file: JsonLines | None = None
        if path is not None:
            self._open(path)

    @property
    def problem(self) -> str | None:
        return self._file.problem if self._file is not None else None

    def _open(self, path: Path) -> None:
        try:
            self._file = JsonLines(path)
            self._load(self._file.found)
        except BlockingIOError:
            raise SettingsError([f"{path} is in use by another sglang-fl check"]) from None
        except OSError as error:
            raise SettingsError([f"{path} cannot be written: {error.strerror}"]) from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise SettingsError([f"{path} is not a result file of this version of sglang-fl check, or a line of it is damaged"]) from None

    def _load(self, lines: Iterable[dict[str, Any]]) -> None:
        """Load a file's results."""
        for data in lines:
            if self.header is None:
                if data.pop("format") != _FORMAT:
                    raise ValueError
                self.header = data
            else:
                self.seconds = data.pop("total_s")
                case = CaseResult(**data)
                self.cases[case.key] = case
        self._earlier = self.seconds

    def begin(self, header: dict[str, Any]) -> None:
        """Write the header of a new file, or compare it with an old file's. Raises SettingsError."""
        header = json.loads(json.dumps(header))
        if self.header is None:
            self.header = header
            self._write({"format": _FORMAT, **header})
            return
        for name in ("machine", "versions", "seed", "quick", "only", "targets"):
            if header[name] != self.header[name]:
                told = f"{name} was {_brief(self.header[name], header[name])} then, and is {_brief(header[name], self.header[name])} now"
                raise SettingsError([f"--resume: the file is of another run ({told}); name another file"])

    def add(self, case: CaseResult, elapsed: float) -> None:
        self.cases[case.key] = case
        self.seconds = round(self._earlier + elapsed, 1)
        self._write({**asdict(case), "total_s": self.seconds})

    def _write(self, data: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.append(data)

    def report(self) -> Report:
        assert self.header is not None
        header = {**self.header, "targets": [Target(**target) for target in self.header["targets"]]}
        place = {(target.op, target.impl): number for number, target in enumerate(header["targets"])}
        cases = sorted((case for case in self.cases.values() if case.target in place), key=lambda case: place[case.target])
        return Report(**header, cases=cases, seconds=self.seconds)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _brief(mine: Any, other: Any) -> Any:
    """The parts of a value that differ from the other's."""
    if isinstance(mine, dict):
        return {name: value for name, value in mine.items() if value != other.get(name)}
    if isinstance(mine, list):
        return [value for value in mine if value not in other][:3]
    return mine


def reports_in(directory: Path) -> Iterator[tuple[Path, Report]]:
    """The finished and unfinished runs in a directory, oldest first. Other files are skipped."""
    for path in sorted(directory.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        record = Record()
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OSError):
            record._load(read_lines(path.read_bytes()))
            if record.header is not None:
                yield path, record.report()
