# SPDX-License-Identifier: Apache-2.0
"""Process: the parent's side of a worker process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from ..utils.signals import exit_reason
from .constants import COMPILING, CRASHED, HUNG, IN_FLOAT64, RUNNING, STARTING, TOO_LONG

#: The time limit for importing PyTorch and all backends, in seconds.
_START_LIMIT = 300.0
#: The time limit for computing in float64 on the CPU, in seconds. It does not count for the implementation.
_FLOAT64_LIMIT = 900.0


class Lost(Exception):
    """The worker did not answer. Has the reason and its last output."""

    def __init__(self, status: str, message: str, output: str):
        super().__init__(message)
        self.status, self.output = status, output


class Process:
    """One worker process, in a session of its own.

    Args:
        job: the worker's job, sent as JSON, see :class:`sglang_fl.check.runner.Job`.
        limit: the seconds that it may run without a message.
        compile_limit: the time limit of a first call.
        module: the module to run.

    Attributes:
        results: the file descriptor that becomes readable when it sends a message.
        open: whether it is still open.
        phase, since: the worker's phase, and its start by the monotonic clock.
    """

    def __init__(self, job: Any, environ: Mapping[str, str], limit: float, compile_limit: float, module: str = "sglang_fl.check.worker"):
        self._limits = {STARTING: _START_LIMIT, RUNNING: limit, COMPILING: compile_limit, IN_FLOAT64: _FLOAT64_LIMIT}
        self._unread, self.open = b"", True
        self._enter(STARTING)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed by end)
        self.results, theirs = os.pipe()
        os.set_blocking(self.results, False)
        # ``-m`` puts the current folder first in sys.path: a vendor's platform.py would hide Python's.
        safely = () if {"", os.getcwd()} & set(sys.path) else ("-P",)
        try:
            self._process = subprocess.Popen(
                [sys.executable, *safely, "-m", module, str(theirs), json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(theirs,),
                start_new_session=True,
                text=True,
                env={**os.environ, **environ},
            )
        finally:
            os.close(theirs)

    def _enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    def ask(self, number: int) -> None:
        """Ask for a case."""
        self._enter(RUNNING)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended; reading its answer tells how.
            print(number, file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any] | None:
        """Wait for its greeting or a case's outcome. Raises Lost."""
        with contextlib.suppress(BlockingIOError):
            while found := os.read(self.results, 1 << 20):
                self._unread += found
            self.open = False
        while b"\n" in self._unread:
            line, _, self._unread = self._unread.partition(b"\n")
            message: dict[str, Any] = json.loads(line)
            if "phase" not in message:
                return message
            self._enter(message["phase"])
        # Its children may keep the pipe open after its end, and it may close the pipe and live on.
        code = self._process.poll()
        if code is not None:
            raise Lost(CRASHED, f"crashed: {exit_reason(code)}", self._last_words())
        limit = self._limits[self.phase]
        if time.monotonic() - self.since <= limit:
            return None
        if self.phase == COMPILING:
            too_long = f"its first call compiled or tuned for more than {limit:g} s (--compile-timeout)"
            raise Lost(TOO_LONG, too_long, self._last_words())
        raise Lost(HUNG, f"hung: no response for {limit:g} s while {self.phase}", self._last_words())

    def _last_words(self) -> str:
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - 4000))
        return self._output.read().decode(errors="replace")

    def kill(self) -> None:
        """Kill it and all its children, without waiting."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait for its end after ``kill``."""
        # A process that hangs in a driver may not end. Do not wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        os.close(self.results)
        self._output.close()
