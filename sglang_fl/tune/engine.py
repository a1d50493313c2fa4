# SPDX-License-Identifier: Apache-2.0
"""Engines, each in its own process with its own environment. They end with their ``with`` block."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from ..dispatch.logger_manager import read_dispatch_log
from ..utils.processes import end_family, family_of

_WORKER = Path(__file__).with_name("engine_worker.py")
#: The dispatch log in an engine's directory, if its environment asks for one.
DISPATCH_LOG = "dispatch.log"
_STOP_SECONDS = 20
_COMMAND_SECONDS = 240


class EngineFailed(RuntimeError):
    """An engine ended, did not answer in time, or reported an error. The message ends with its log's last lines."""


class CommandFailed(EngineFailed):
    """A command failed. The engine takes the next one."""


class Engine:
    """The process of one engine. Commands are ``engine_worker.py``'s.

    Args:
        arguments: of ``sglang.Engine``.
        directory: for its logs.
        environ: all of its environment.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], directory: Path, environ: Mapping[str, str]):
        self.name = name
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.log = directory / "engine.log"
        self.dispatch_log = directory / DISPATCH_LOG
        self._arguments = dict(arguments)
        self._environ = dict(environ)
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._answers = -1
        self._unread = b""
        self._started = 0.0
        self.description: dict[str, Any] | None = None
        self.startup_seconds = 0.0

    @property
    def ready(self) -> bool:
        return self.description is not None

    def start(self) -> None:
        self._answers, theirs = os.pipe()
        self._started = time.perf_counter()
        try:
            with self.log.open("wb") as output:
                self._process = subprocess.Popen(
                    # -P: our modules must not hide those that SGLang imports.
                    [sys.executable, "-P", str(_WORKER), str(theirs)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environ,
                    pass_fds=(theirs,),
                    # When the parent dies, the kernel continues stopped processes of this group and sends SIGHUP. In a session
                    # of its own it would not, and stopped engines would survive a killed benchmark.
                    process_group=0,
                )
        finally:
            os.close(theirs)
        self._send(self._arguments)

    def wait_until_ready(self, deadline: float) -> None:
        """Wait until the engine serves.

        Raises:
            EngineFailed: it does not serve by ``deadline`` (of ``time.perf_counter``).
        """
        self.description = self._receive(deadline, "the start")
        self.startup_seconds = time.perf_counter() - self._started

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Execute a command.

        Raises:
            CommandFailed: the command failed.
            EngineFailed: the engine is unusable.
        """
        self._send({"do": do, **values})
        return self._receive(time.perf_counter() + _COMMAND_SECONDS, do)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def fileno(self) -> int:
        return self._answers

    def pause(self) -> None:
        """Stop its processes (SIGSTOP) until the next command or the end."""
        if self._process is not None:
            self._paused = True  # before the signal: an interrupt between the two does no harm
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False

    def request_stop(self) -> None:
        """Ask an idle engine to shut down."""
        if self.ready and self.alive():
            with contextlib.suppress(EngineFailed):
                self._send({"do": "stop"})

    def kill(self) -> None:
        """End the process and all its children, orphans included."""
        if self._process is None:
            return
        self.resume()
        end_family(self._process.pid, os.getpgid, _STOP_SECONDS)
        self._process.wait()
        with contextlib.suppress(OSError):  # data that could not be written any more
            self._process.stdin.close()  # type: ignore[union-attr]
        os.close(self._answers)
        self._process, self.description = None, None

    def wait(self, deadline: float) -> None:
        """Wait until the process has ended, or until the deadline."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=max(0.0, deadline - time.perf_counter()))

    def pids(self) -> list[int]:
        return [process.pid for process in self._family()]

    def host_memory(self) -> int:
        """Bytes of host memory of its processes. Shared memory counts for each."""
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def dispatched(self) -> list[str]:
        """The lines of the dispatch log, each once."""
        if not self.dispatch_log.exists():
            return []
        return [f"{name} → {destination}" for name, destination in read_dispatch_log(self.dispatch_log.read_text(errors="replace"))]

    def last_lines(self, count: int = 15) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([line for line in lines if line.strip()][-count:])

    def _family(self) -> list[psutil.Process]:
        assert self._process is not None
        return family_of(self._process.pid, os.getpgid)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _send(self, values: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self.resume()
        try:
            self._process.stdin.write(json.dumps(values).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed(f"it cannot be reached any more ({error})") from error

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.perf_counter()))
            if not readable:
                raise self._failed(f"no answer to {what} in time")
            more = os.read(self._answers, 1 << 16)
            if not more:
                self.wait(time.perf_counter() + 5)
                code = self._process.poll() if self._process is not None else None
                raise self._failed(f"it ended during {what} (exit code {code})")
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CommandFailed(f"{self.name}: {answer['error']}\n{self.last_lines()}")
        return answer

    def _failed(self, why: str) -> EngineFailed:
        return EngineFailed(f"{self.name}: {why}\n{self.last_lines()}")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that ends engines: a second Ctrl-C must not leave one behind."""
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class Engines:
    """The engines of a run. Use it in a ``with`` statement, which ends them."""

    def __init__(self, engines: Sequence[Engine]):
        self.all = list(engines)
        #: The name of a failed variant -> the reason.
        self.errors: dict[str, str] = {}

    @property
    def up(self) -> list[Engine]:
        return [engine for engine in self.all if engine.ready]

    def start(self, *, apart: bool, seconds: float, on_ready: Callable[[Engine], None]) -> None:
        """Start all engines, together or one after the other. Those that fail are left out of the run.

        Args:
            apart: start each one when the previous one is ready.
            seconds: the time limit of each.
            on_ready: called for each when it is ready.
        """
        for group in [[engine] for engine in self.all] if apart else [self.all]:
            deadline = time.perf_counter() + seconds
            for engine in group:
                with self.dropping(engine):
                    engine.start()
            waiting = [engine for engine in group if engine.name not in self.errors]
            while waiting:
                readable, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.perf_counter()))
                for engine in readable or list(waiting):
                    waiting.remove(engine)
                    with self.dropping(engine):
                        engine.wait_until_ready(deadline)
                        on_ready(engine)

    @contextlib.contextmanager
    def dropping(self, engine: Engine) -> Any:
        """A block that uses the engine. If it fails, it is ended and left out of the run."""
        try:
            yield
        except EngineFailed as error:
            self.errors[engine.name] = str(error)
            engine.kill()

    @contextlib.contextmanager
    def alone(self, engine: Engine) -> Iterator[None]:
        """Like ``dropping``, with the other engines stopped until their next command."""
        for other in self.up:
            if other is not engine:
                other.pause()
        with self.dropping(engine):
            yield

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with uninterrupted():
            # After an interrupt an engine may be busy and not answer.
            if kind is None:
                for engine in self.all:
                    engine.request_stop()
                deadline = time.perf_counter() + _STOP_SECONDS
                for engine in self.up:
                    engine.wait(deadline)
            for engine in self.all:
                engine.kill()
