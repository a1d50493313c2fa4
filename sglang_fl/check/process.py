# SPDX-License-Identifier: Apache-2.0
"""Process: the parent's side of a worker process."""

import time
from collections.abc import Mapping
from typing import Any

from ..utils.child import Child
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
    """One worker process; see ``check.worker.serve``.

    Args:
        job: what its worker is made of.
        limit: the seconds that it may run without a message.
        compile_limit: the time limit of a first call.
        module: the module to run.

    Attributes:
        connection: becomes readable when it sends a message.
        open: whether the connection is still open.
        phase, since: the worker's phase, and its start by the monotonic clock.
    """

    def __init__(self, job: Any, environ: Mapping[str, str], limit: float, compile_limit: float, module: str = "sglang_fl.check.worker"):
        self._limits = {STARTING: _START_LIMIT, RUNNING: limit, COMPILING: compile_limit, IN_FLOAT64: _FLOAT64_LIMIT}
        self._enter(STARTING)
        self._child, self.open = Child(module, environ), True
        self.connection, self.kill, self.close = self._child.connection, self._child.kill, self._child.close
        self._child.send(job)

    def _enter(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    def ask(self, case: Any) -> None:
        """Ask for a case, by what its worker calls it."""
        self._enter(RUNNING)
        self._child.send(case)

    def answer(self, seconds: float = 0.0) -> Any:
        """Wait for its greeting or a case's outcome. None: not yet. Raises Lost."""
        try:
            while self.open and (message := self._child.receive(seconds)) is not None:
                if not isinstance(message, str):
                    return message
                self._enter(message)
        except EOFError:
            self.open = False
        # It may close the connection and live on.
        ending = self._child.ending(0.0 if self.open else seconds)
        if ending is not None:
            raise Lost(CRASHED, f"crashed: {ending}", self._child.last_words())
        limit = self._limits[self.phase]
        if time.monotonic() - self.since <= limit:
            return None
        if self.phase == COMPILING:
            too_long = f"its first call compiled or tuned for more than {limit:g} s (--compile-timeout)"
            raise Lost(TOO_LONG, too_long, self._child.last_words())
        raise Lost(HUNG, f"hung: no response for {limit:g} s while {self.phase}", self._child.last_words())
