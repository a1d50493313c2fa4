# SPDX-License-Identifier: Apache-2.0
"""LoadedModel: a model in worker processes, one per rank. This parent side imports neither SGLang nor PyTorch."""

import argparse
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from types import TracebackType
from typing import IO, Any

from ..utils.server import free_port
from ..utils.signals import exit_reason

#: The time limit of loading, in seconds: enough for hundreds of gigabytes from a slow disk.
LOAD_LIMIT = 3600.0
_POLL_SECONDS, _END_SECONDS = 0.05, 10.0


class RunFailed(RuntimeError):
    """A call returned no result.

    Attributes:
        rank: the rank where this was found first.
        output: the last output of this rank's process.
    """

    def __init__(self, message: str, rank: int, output: str):
        super().__init__(message)
        self.rank, self.output = rank, output


class Crashed(RunFailed):
    """A rank's process ended."""


class Hung(RunFailed):
    """A call exceeded its time limit."""


class CallFailed(RunFailed):
    """The called function raised, or loading failed. The processes still answer, unless a collective was left unfinished."""


class LoadedModel:
    """A model in one process per rank, loaded as in a server. Use it in a ``with`` statement, which loads the model.

    Args:
        model: a directory, or a name that SGLang downloads.
        arguments: any other argument of an SGLang server.
        environ: added to this process's environment.
    """

    def __init__(self, model: str, arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None):
        self._ranks = ranks_of(arguments)
        self._job = {"model": model, "arguments": list(arguments), "ranks": self._ranks, "port": free_port()}
        path = os.pathsep.join(filter(None, sys.path))
        self._environ = {**os.environ, "PYTHONPATH": path, **(environ or {})}
        self._workers: list[_Worker] = []

    def __enter__(self) -> "LoadedModel":
        try:
            self._workers = [_Worker({**self._job, "rank": rank}, self._environ) for rank in range(self._ranks)]
            self._answers(LOAD_LIMIT, "loading the model")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def call(self, function: Callable[..., Any], *args: Any, limit: float = 600.0) -> list[Any]:
        """Call ``function(run, *args)`` in each rank. ``run`` is a :class:`ModelRun`. The function must be a module's attribute.

        Args:
            limit: the time limit in seconds.

        Returns:
            the results, by rank.

        Raises:
            RunFailed: the function raised, a process ended, or the limit was exceeded. After :class:`Crashed` and :class:`Hung`
                no process is left.
        """
        message = pickle.dumps((function, args))
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):  # it has ended; reading its answer shows how
                worker.connection.send_bytes(message)
        return self._answers(limit, getattr(function, "__name__", str(function)))

    def _answers(self, limit: float, what: str) -> list[Any]:
        end = time.monotonic() + limit
        results: dict[int, Any] = {}
        failed: CallFailed | None = None
        while len(results) < len(self._workers):
            for rank, worker in enumerate(self._workers):
                if rank in results:
                    continue
                try:
                    answer = worker.answer(_POLL_SECONDS)
                except (EOFError, ConnectionError):
                    self._lost(Crashed(f"{self._of(rank)} ended while {what}: {worker.ending()}", rank, worker.last_words()), failed)
                if answer is not None:
                    results[rank] = answer[1]
                    if answer[0] == "raised" and failed is None:
                        failed = CallFailed(f"{self._of(rank)}, {what}: {answer[1]}", rank, answer[2] or worker.last_words())
                        end = min(end, time.monotonic() + _END_SECONDS)  # the other ranks may wait for this one in a collective
            if time.monotonic() > end and len(results) < len(self._workers):
                rank = next(rank for rank in range(len(self._workers)) if rank not in results)
                message = f"{self._of(rank)} gave no answer within {limit:g} s while {what}"
                self._lost(Hung(message, rank, self._workers[rank].last_words()), failed)
        if failed is not None:
            raise failed
        return [results[rank] for rank in range(len(self._workers))]

    def _lost(self, error: RunFailed, first: RunFailed | None) -> None:
        """End all processes, since ranks wait for each other. Raises the first error."""
        self.close()
        raise first or error

    def _of(self, rank: int) -> str:
        return f"rank {rank}" if self._ranks > 1 else "the model's process"

    def close(self) -> None:
        """End the processes and all their children."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """A process in a session of its own, so that Ctrl-C reaches only its parent."""

    def __init__(self, job: Mapping[str, Any], environ: Mapping[str, str]):
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        ours, theirs = socketpair()
        self.connection = Connection(ours.detach())
        try:
            # ``-m`` puts the current folder first in sys.path: a vendor's platform.py would hide Python's.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sglang_fl.model_run.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=dict(environ),
            )
        finally:
            theirs.close()
        self.connection.send_bytes(pickle.dumps(job))

    def answer(self, seconds: float) -> Any:
        """Wait for (``"result"``, value) or (``"raised"``, message, traceback). Raises EOFError if the process has ended."""
        if self.connection.poll(seconds):
            return pickle.loads(self.connection.recv_bytes())
        if self._process.poll() is not None and not self.connection.poll(0):
            raise EOFError  # its children may keep the connection open
        return None

    def ending(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return exit_reason(self._process.wait(timeout=_END_SECONDS))
        return "it closed the connection"

    def last_words(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
        return self._log.read().decode(errors="replace")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        # A process that hangs in a driver may not end. Do not wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_END_SECONDS)
        self.connection.close()
        self._log.close()


def ranks_of(arguments: Sequence[str]) -> int:
    """The number of ranks in a server's arguments. 1 if it cannot be read; SGLang then reports the error."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--tensor-parallel-size", "--tp-size", "--tp", type=int, default=1, dest="ranks")
    try:
        return max(1, parser.parse_known_args(list(arguments))[0].ranks)
    except argparse.ArgumentError:
        return 1


def is_missing_directory(model: str) -> bool:
    """Whether a model is a path that does not exist. SGLang would look it up on the Hugging Face Hub."""
    path = Path(model).expanduser()
    return not path.exists() and (model.startswith(("/", ".", "~")) or model.count("/") > 1)
