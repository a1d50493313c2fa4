# SPDX-License-Identifier: Apache-2.0
"""LoadedModel: a model in worker processes, one per rank. This parent side imports neither SGLang nor PyTorch."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..utils.child import Child
from ..utils.server import free_port

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
        self._environ = environ or {}
        self._workers: list[Child] = []

    def __enter__(self) -> "LoadedModel":
        try:
            self._workers = [Child("sglang_fl.model_run.worker", self._environ) for _ in range(self._ranks)]
            for rank, worker in enumerate(self._workers):
                worker.send({**self._job, "rank": rank})
            self._answers(LOAD_LIMIT)
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
        for worker in self._workers:
            worker.send((function, args))
        return self._answers(limit)

    def _answers(self, limit: float) -> list[Any]:
        end = time.monotonic() + limit
        results: dict[int, Any] = {}
        failed: CallFailed | None = None
        while len(results) < len(self._workers):
            for rank, worker in enumerate(self._workers):
                if rank in results:
                    continue
                try:
                    answer = worker.receive(_POLL_SECONDS)
                except EOFError:
                    ending = worker.ending() or "it closed the connection"
                    self._lost(Crashed(f"{self._of(rank)} ended: {ending}", rank, worker.last_words()), failed)
                if answer is not None:
                    results[rank] = answer[1]
                    if answer[0] == "raised" and failed is None:
                        failed = CallFailed(f"{self._of(rank)}: {answer[1]}", rank, answer[2] or worker.last_words())
                        end = min(end, time.monotonic() + _END_SECONDS)  # the other ranks may wait for this one in a collective
            if time.monotonic() > end and len(results) < len(self._workers):
                rank = next(rank for rank in range(len(self._workers)) if rank not in results)
                message = f"{self._of(rank)} gave no answer within {limit:g} s"
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
