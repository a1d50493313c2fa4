# SPDX-License-Identifier: Apache-2.0
"""A Python process that may crash or hang, and the connection to it."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from socket import socketpair
from typing import Any

from .signals import exit_reason

_END_SECONDS = 10.0


class Child:
    """``python -m MODULE DESCRIPTOR``, in a session of its own, so that Ctrl-C reaches only its parent.

    Args:
        environ: added to this process's environment.

    Attributes:
        connection: becomes readable when the child sends a message or closes it.
    """

    def __init__(self, module: str, environ: Mapping[str, str]):
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        ours, theirs = socketpair()
        self.connection = Connection(ours.detach())
        # ``-m`` would put the current folder first in sys.path: a vendor's platform.py would hide Python's. Where this process looks
        # there too, as under ``python -m pytest``, the child does as well: a package under work goes before an installed one.
        here = os.getcwd()
        paths = [here if {"", here} & set(sys.path) else None, os.environ.get("PYTHONPATH"), *sys.path]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environ},
            )
        finally:
            theirs.close()

    def send(self, message: Any) -> None:
        """Send a message. If the child has ended, ``receive`` shows it."""
        with contextlib.suppress(BrokenPipeError):
            send(self.connection, message)

    def receive(self, seconds: float = 0.0) -> Any:
        """Wait for a message. None if there is none yet. Raises EOFError if the child has ended or closed the connection."""
        try:
            if self.connection.poll(seconds):
                return receive(self.connection)
        except OSError:
            raise EOFError from None
        if self._process.poll() is not None and not self.connection.poll(0):
            raise EOFError  # its own children may keep the connection open
        return None

    def ending(self, seconds: float = _END_SECONDS) -> str | None:
        """How the child ended. None if it still runs after these seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return exit_reason(self._process.wait(timeout=seconds))
        return None

    def last_words(self) -> str:
        """The end of the child's output."""
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - 4000))
        return self._output.read().decode(errors="replace")

    def kill(self) -> None:
        """Kill the child and all its children, without waiting."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait for its end after ``kill``. A process that hangs in a driver may not end; do not wait longer for it."""
        self.ending()
        self.connection.close()
        self._output.close()


def connection_to_parent() -> Connection:
    """In a child: its side of the connection."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    return Connection(descriptor)


def send(connection: Connection, message: Any) -> None:
    # Not ``Connection.send``: PyTorch would share tensors through files that the process keeps open.
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """Wait for a message. Raises EOFError if the other process has ended."""
    return pickle.loads(connection.recv_bytes())
