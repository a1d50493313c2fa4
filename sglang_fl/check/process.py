# SPDX-License-Identifier: Apache-2.0
"""Process: one worker process, as its parent sees it."""

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

#: Importing PyTorch and every backend must be done by then, in seconds.
_START_LIMIT = 300.0
#: Computing in float64, on the CPU, is not the implementation's time.
_FLOAT64_LIMIT = 900.0


class Lost(Exception):
    """The worker did not answer: why, and its last output."""

    def __init__(self, status: str, message: str, output: str):
        super().__init__(message)
        self.status, self.output = status, output


class Process:
    """One worker process, in a session of its own.

    Args:
        job: what the worker is given as JSON, see :class:`sglang_fl.check.runner.Job`.
        limit: how long it may run without a sign, in seconds.
        compile_limit: how long a first call may take.
        module: what is run.

    Attributes:
        results: the file descriptor that becomes readable when it says something.
        open: whether it has not closed them.
        phase, since: what it is at, and since when by the monotonic clock.
    """

    def __init__(self, job: Any, environ: Mapping[str, str], limit: float, compile_limit: float, module: str = "sglang_fl.check.worker"):
        self._limits = {STARTING: _START_LIMIT, RUNNING: limit, COMPILING: compile_limit, IN_FLOAT64: _FLOAT64_LIMIT}
        self._unread, self.open = b"", True
        self._enter(STARTING)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed by end)
        self.results, theirs = os.pipe()
        os.set_blocking(self.results, False)
        # ``-m`` puts this folder before the library: a vendor's platform.py would be taken for Python's.
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
        """Have a case run."""
        self._enter(RUNNING)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended; reading its answer tells how.
            print(number, file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any] | None:
        """Its greeting or a case's outcome, once there is one. Raises Lost."""
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
        """End it and everything that it started, and do not wait for that."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """After ``kill``: wait for its end."""
        # A kernel that hangs in a driver can keep its process from ending: do not wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        os.close(self.results)
        self._output.close()
