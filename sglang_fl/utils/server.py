# SPDX-License-Identifier: Apache-2.0
"""A real SGLang server as a child process that never outlives its block, unless asked to."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import requests

from .processes import end_family

_STARTUP_SECONDS = 600
_STOP_SECONDS = 15
_PORTS = range(20000, 32768)


class ServerFailed(RuntimeError):
    """The server ended, or did not come up in time. The message ends with its last lines."""


def free_port() -> int:
    """A TCP port that nobody listens on.

    A server listens on it a minute later. Until then the kernel may not give it to another program, so it is none of those that the
    kernel gives to who asks for any: Linux takes these from 32768 on.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        if port_is_free(port):
            return port
    raise OSError(f"all ports from {_PORTS.start} to {_PORTS.stop - 1} are in use")


def port_is_free(port: int) -> bool:
    """Whether a server could listen on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


class Server:
    """``python -m sglang.launch_server``, or another command with its arguments, on 127.0.0.1, with its output in a file.

    Use it in a ``with`` statement. The server leads a session of its own, so that Ctrl-C reaches it
    through us, once, and everything it started can be ended with it.
    """

    def __init__(
        self,
        model: Path,
        *,
        port: int,
        log: Path,
        arguments: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        command: Sequence[str] = ("sglang.launch_server",),
    ):
        self.port = port
        self.log = log
        self.keep = False
        self.module = command[0]
        own = ["--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
        self._command = [sys.executable, "-m", *command, *own, *arguments]
        self._environ = {**os.environ, **(environ or {})}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def __enter__(self) -> "Server":
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=self._environ, start_new_session=True
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not (self.keep and kind is None):
            self.stop()

    def wait_until_ready(self, timeout: float = _STARTUP_SECONDS) -> None:
        """Return once the server answers.

        Args:
            timeout: in seconds.

        Raises:
            ServerFailed: the server ended, or is not ready in time.
        """
        started = time.monotonic()
        while True:
            passed = time.monotonic() - started
            assert self.process is not None
            if self.process.poll() is not None:
                raise ServerFailed(f"the server ended with exit code {self.process.returncode}:\n{self.last_lines()}")
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            if passed > timeout:
                raise ServerFailed(f"the server was not ready after {timeout:.0f} s:\n{self.last_lines()}")
            time.sleep(1)

    def last_lines(self, count: int = 30) -> str:
        """The end of what the server printed."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-count:])

    def stop(self) -> None:
        """End the server and everything that it started."""
        if self.process is None:
            return
        # Its main process first, which ends the others in order; killed from outside, they would be
        # taken for crashed, and examined.
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=_STOP_SECONDS)
        end_family(self.process.pid, os.getsid, _STOP_SECONDS)
        self.process.wait()
