# SPDX-License-Identifier: Apache-2.0
"""Checks candidates in a process that may crash. A new process continues after the case that crashed it."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..check.constants import DEVICE_LOST, FAILED, LOST
from ..check.process import Lost, Process
from .judge import Candidate

#: The time limits of a call and of a first call, in seconds.
_LIMIT, _COMPILE_LIMIT = 60.0, 300.0
_POLL_SECONDS = 0.5
#: Threads for float64 on the host. More than the process may use cost seconds per call, and a container often sees too many.
_MOST_THREADS = 4


class Checker:
    """Runs the cases of :mod:`sglang_fl.tune.worker`, in a ``with`` statement.

    Args:
        file: where the cases are written for the process.
        remaining: seconds for all of them, or None: no first call may take more than a part of it.
    """

    def __init__(self, cases: Sequence[Mapping[str, Any]], file: Path, remaining: float | None = None):
        file.write_text(json.dumps(list(cases)), encoding="utf-8")
        self._file = file
        self._compile_limit = _COMPILE_LIMIT if remaining is None else min(_COMPILE_LIMIT, max(_LIMIT / 2, remaining / 4))
        self._process: Process | None = None

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def run(self, number: int) -> dict[str, Any]:
        """``status`` and ``message`` of a case, as in ``sglang-fl check``."""
        try:
            if self._process is None:
                threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(min(_MOST_THREADS, os.cpu_count() or 1)))}
                self._process = Process(str(self._file), threads, _LIMIT, self._compile_limit, "sglang_fl.tune.worker")
                self._answer()
            self._process.ask(number)
            answer = self._answer()
            if answer["status"] == DEVICE_LOST:
                answer |= {"status": FAILED, "lost": True}
            if answer.pop("lost", False):  # the next case gets a new process
                self._end()
            return answer
        except Lost as lost:
            self._end()
            output = lost.output.strip().splitlines()
            return {"status": lost.status, "message": f"{lost}{f': {output[-1]}' if output else ''}"}

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        while (answer := self._process.answer(_POLL_SECONDS)) is None:
            pass
        return answer

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.close()
            self._process = None


def is_crash(status: str) -> bool:
    return status in LOST


def case_of(candidate: Candidate, call: Mapping[str, Any]) -> dict[str, Any]:
    """A case for the checking process."""
    if candidate.impl is None:
        return {"kind": "function", "function": candidate.name, "key": call["key"], "args": call["args"], "kwargs": call["kwargs"]}
    return {
        "kind": "layer",
        "op": candidate.name,
        "impl": candidate.impl,
        "name": call["call"],
        "file": call["file"],
        "dtype": call["dtype"],
    }
