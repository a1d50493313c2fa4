# SPDX-License-Identifier: Apache-2.0
"""Runs cases in another process, and survives what they do to it.

A case that ends its process, or takes longer than its limit, is a result; the next case gets a new process.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .constants import COMPILE, CRASHED, HUNG, IN_FLOAT64, NOT_RUN
from .report import CaseResult, Report

#: Importing PyTorch and every backend must be done by then, in seconds.
_START_LIMIT = 300.0
#: Computing in float64, on the CPU, is not the implementation's time.
_FLOAT64_LIMIT = 900.0
#: How often to check that a silent process is still there, in seconds.
_POLL_INTERVAL = 0.5
#: A compilation may take this many times the limit of a case.
_TIMEOUT_FACTOR = {COMPILE: 4}
#: After so many cases that ended their process an implementation's other cases are left out.
_GIVE_UP_AFTER = 3

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Job:
    """What to check: pairs of an operator and an implementation's id, and how.

    Attributes:
        named: each of them was asked for by name, so that one which cannot run here is a failure.
    """

    targets: Sequence[tuple[str, str]]
    quick: bool
    seed: int
    timeout: float
    named: bool = False


class WorkerFailed(RuntimeError):
    """The checking process did not start."""


@dataclass
class _Ended(Exception):
    """The worker gave no answer: crashed or hung, and its last words."""

    status: str
    message: str
    output: str = ""


@dataclass
class _Worker:
    """One process, in a session of its own."""

    job: Job
    _process: subprocess.Popen[str] = field(init=False)
    _unread: bytes = b""

    def __post_init__(self) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed by end)
        self._results, theirs = os.pipe()
        # ``-m`` puts this folder before the library: a vendor's platform.py would be taken for Python's.
        safely = () if {"", os.getcwd()} & set(sys.path) else ("-P",)
        job = json.dumps({"targets": self.job.targets, "quick": self.job.quick, "seed": self.job.seed})
        try:
            self._process = subprocess.Popen(
                [sys.executable, *safely, "-m", "sglang_fl.check.worker", str(theirs), job],
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(theirs,),
                start_new_session=True,
                text=True,
                # One process is enough for the few kernels of a case, and pools outlive their parent.
                env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            )
        finally:
            os.close(theirs)

    def ask(self, number: int, limit: float) -> dict[str, Any]:
        """Have a case run, for which the implementation has ``limit`` seconds at a time. Raises _Ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended; reading its answer tells how.
            print(number, file=self._process.stdin, flush=True)
        allowed = limit
        while True:
            answer = self.read(allowed)
            if IN_FLOAT64 not in answer:
                return answer
            allowed = _FLOAT64_LIMIT if answer[IN_FLOAT64] else limit

    def read(self, limit: float) -> dict[str, Any]:
        """Its next line, for which it has ``limit`` seconds beside those that it waited for a processor. Raises _Ended."""
        start, before = time.monotonic(), self._on_processors()
        while b"\n" not in self._unread:
            left = start + limit - time.monotonic()
            if left <= 0:  # only then is it looked up
                left += self._kept_waiting(before, time.monotonic() - start)
            ready, _, _ = select.select([self._results], [], [], max(0.0, min(left, _POLL_INTERVAL)))
            found = os.read(self._results, 1 << 16) if ready else b""
            self._unread += found
            if found:
                continue
            # What it forked may hold its results open when it is gone, and it may close them and live on.
            code = self._process.poll()
            if code is not None:
                raise _Ended(CRASHED, f"crashed: {_exit_reason(code)}", self._last_words())
            if left <= 0:
                message = f"hung: more than {limit:g} s; what compiles or tunes at its first call may need a longer --timeout"
                raise _Ended(HUNG, message, self._last_words())
            if ready:
                time.sleep(0.05)
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _kept_waiting(self, before: dict[str, tuple[float, float]], elapsed: float) -> float:
        """How many of the seconds since ``before`` were other processes': where it had every processor it waited for itself."""
        ran, waited = 0.0, 0.0
        for thread, (ran_now, waited_now) in self._on_processors().items():
            ran_then, waited_then = before.get(thread, (0.0, 0.0))
            ran += ran_now - ran_then
            waited = max(waited, waited_now - waited_then)
        return max(0.0, min(waited, elapsed - ran / len(os.sched_getaffinity(0)))) if waited else 0.0

    def _on_processors(self) -> dict[str, tuple[float, float]]:
        """How long each of its threads ran and waited for a processor, in seconds, where the system tells (Linux)."""
        found = {}
        for file in Path(f"/proc/{self._process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, ValueError):  # the thread is gone, or there are no such statistics
                ran, waited, _ = map(int, file.read_text().split())
                found[file.parent.name] = ran / 1e9, waited / 1e9
        return found

    def _last_words(self) -> str:
        self._output.seek(max(0, self._output.seek(0, os.SEEK_END) - 4000))
        return self._output.read().decode(errors="replace")

    def end(self) -> None:
        """End it and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # A kernel that hangs in a driver can keep its process from ending; it is not waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        os.close(self._results)
        self._output.close()


def _exit_reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def check(job: Job, progress: Progress = lambda done, total, what: None) -> Report:
    """Run every case of every implementation, or those before a KeyboardInterrupt.

    Args:
        progress: called before each case with the number of cases done, of all, and the next one's name.

    Raises:
        WorkerFailed: the checking process does not start.
        KeyboardInterrupt: before the first case was done.
    """
    start = time.monotonic()
    worker, hello = _start(job)
    session, cases = _Session(job, worker), hello["cases"]
    results: list[CaseResult] = []
    try:
        for number, case in enumerate(cases):
            op, impl = job.targets[case["target"]]
            progress(number, len(cases), f"{op} {impl}: {case['check']}")
            results.append(session.run(number, case))
        progress(len(cases), len(cases), "")
    except KeyboardInterrupt:
        if not results:
            raise
    finally:
        session.end()
    why_not = zip(job.targets, hello["why_not"], strict=True)
    return Report(
        machine=hello["machine"],
        versions=hello["versions"],
        seed=job.seed,
        quick=job.quick,
        seconds=round(time.monotonic() - start, 1),
        not_available=[{"op": op, "impl": impl, "why": why, "named": job.named} for (op, impl), why in why_not if why is not None],
        cases=results,
        not_reached=len(cases) - len(results),
    )


class _Session:
    """Runs a job's cases, in a new worker after one that was lost."""

    def __init__(self, job: Job, worker: _Worker):
        self._job = job
        self._worker: _Worker | None = worker
        self._losses: Counter[int] = Counter()
        self._no_worker = ""

    def run(self, number: int, case: dict[str, Any]) -> CaseResult:
        target = case["target"]
        op, impl = self._job.targets[target]
        facts = {"op": op, "impl": impl, "check": case["check"], "name": case["name"], "dtype": case["dtype"]}
        reason = self._reason_not_to_run(target)
        if reason:
            return CaseResult(**facts, status=NOT_RUN, message=f"not run: {reason}")
        assert self._worker is not None
        try:
            answer = self._worker.ask(number, self._job.timeout * _TIMEOUT_FACTOR.get(case["check"], 1))
        except _Ended as end:
            self._losses[target] += 1
            answer = {"status": end.status, "message": end.message, "output": end.output, "broken": True}
        if answer.pop("broken"):
            self.end()
        return CaseResult(**facts, **answer)

    def _reason_not_to_run(self, target: int) -> str:
        """Starts a worker if there is none; empty if it can run a case of this implementation."""
        if not self._no_worker and self._losses[target] >= _GIVE_UP_AFTER:
            return f"{_GIVE_UP_AFTER} cases of this implementation have ended their process"
        if not self._no_worker and self._worker is None:
            try:
                self._worker, _ = _start(self._job)
            except WorkerFailed as error:  # the device may have gone with the last case; what was found has not
                self._no_worker = str(error)
        return self._no_worker

    def end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()


def _start(job: Job) -> tuple[_Worker, dict[str, Any]]:
    worker = _Worker(job)
    try:
        return worker, worker.read(_START_LIMIT)
    except _Ended as end:
        worker.end()
        raise WorkerFailed(f"the checking process did not start: {end.message}\n{end.output}") from None
    except BaseException:
        worker.end()
        raise
