# SPDX-License-Identifier: Apache-2.0
"""Runs cases in parallel worker processes, which may crash or hang.

A crash or an exceeded time limit is a result, and the next case gets a new process. The cases of an implementation stay with one
worker while other implementations wait, because kernels are compiled and tuned once per process.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..config import SettingsError
from ..utils.folders import user_folder
from ..utils.packages import sources_of
from .constants import DEVICE_LOST, FAILED, LOST, NO_MEMORY, NOT_RUN, SKIPPED, SPEED, STARTING
from .process import Lost, Process
from .record import Record
from .results import CaseResult, Target

#: After this many crashes or hangs an implementation's other cases are left out.
_GIVE_UP_AFTER = 3
#: The largest default number of workers. More find no work, and each takes device memory.
_MOST_WORKERS = 16
#: The interval for checking silent processes, in seconds.
_POLL_INTERVAL = 0.2


@dataclass(frozen=True)
class Job:
    """What to check: pairs of an operator and an implementation's id, and how.

    Attributes:
        only: words that select cases.
        named: each target was requested by name, so it is a failure if it cannot run here.
        workers: the number of processes. None: by the number of processors.
        budget: stop after this many seconds.
        archives: the directory for the inputs of failing cases.
    """

    targets: Sequence[tuple[str, str]]
    quick: bool
    seed: int
    timeout: float = 60.0
    compile_timeout: float = 300.0
    only: Sequence[str] = ()
    named: bool = False
    workers: int | None = None
    budget: float = float("inf")
    archives: Path | None = None


@dataclass
class Progress:
    """The progress of a run: finished cases, all cases, and the running ones: (case, phase, seconds)."""

    done: int
    total: int
    running: list[tuple[str, str, float]] = field(default_factory=list)


class WorkerFailed(RuntimeError):
    """The checking process does not start."""


def check(job: Job, record: Record, progress: Callable[[Progress], None] = lambda progress: None) -> bool:
    """Run every case that is not in the record yet.

    Returns:
        False if it was interrupted by a KeyboardInterrupt.

    Raises:
        WorkerFailed: the checking process does not start.
        SettingsError: the record is of another run, or no case has the words of ``job.only``.
    """
    run = _Run(job, record, progress)
    try:
        run.to_its_end()
    except KeyboardInterrupt:
        return False
    finally:
        run.end()
    return True


@dataclass(eq=False)
class _Worker:
    """A process and its current case."""

    process: Process
    from_dear_end: bool
    ready: bool = False
    case: CaseResult | None = None
    #: The operator and implementation of the last case, and of all cases so far.
    target: tuple[str, str] | None = None
    seen: set[tuple[str, str]] = field(default_factory=set)


class _Run:
    """The state of a run: waiting cases, and workers."""

    def __init__(self, job: Job, record: Record, progress: Callable[[Progress], None]):
        self._job, self._record, self._progress = job, record, progress
        self._begun = time.monotonic()
        #: The number of cases. None: the first worker has not listed them yet.
        self._total: int | None = None
        self._waiting: dict[tuple[str, str], list[CaseResult]] = {}
        #: Cases that need the machine to themselves.
        self._alone: list[CaseResult] = []
        self._losses: Counter[tuple[str, str]] = Counter()
        self._workers: list[_Worker] = []
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        free = max(min(2, processors), processors - 2)
        self._count = job.workers or min(_MOST_WORKERS, free, 1 if job.only else max(1, 4 * len(job.targets)))
        self._environ = {
            # Threads that wait for each other take ten times as long where another process runs on one of their processors.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (processors - 2) // self._count))),
            # One compile process is enough for a case's few kernels, and pools outlive their parent.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            # Tuning results are distorted by other workers, so servers must not use them.
            "FLAGGEMS_CACHE_DIR": str(user_folder("cache", "what FlagGems tunes in a check") / "check-flaggems"),
        }

    def to_its_end(self) -> None:
        for index in range(self._count):
            self._start(from_dear_end=bool(index % 2))
        while not self._is_done() and time.monotonic() - self._begun < self._job.budget:
            self._hand_out()
            self._listen()
            self._progress(self._how_far())

    def _is_done(self) -> bool:
        return self._total is not None and not self._alone and not any(self._waiting.values()) and not any(map(_is_busy, self._workers))

    def _start(self, from_dear_end: bool) -> None:
        process = Process(self._job, self._environ, self._job.timeout, self._job.compile_timeout)
        self._workers.append(_Worker(process, from_dear_end))

    def _listen(self) -> None:
        """Wait for the workers' messages, and handle them."""
        wait([worker.process.connection for worker in self._workers if worker.process.open], _POLL_INTERVAL)
        for worker in list(self._workers):
            try:
                message = worker.process.answer()
            except Lost as lost:
                self._lose(worker, lost)
                continue
            if message is None:
                continue
            if not worker.ready:
                worker.ready = True
                if self._total is None:
                    self._learn(message)
            else:
                self._take(worker, message)

    def _learn(self, hello: Mapping[str, Any]) -> None:
        """The first worker's greeting lists the cases."""
        cases: list[CaseResult] = hello["cases"]
        if self._job.only and not cases and not any(hello["why_not"]):
            raise SettingsError([f"--case: no case has all the words of {' or '.join(map(repr, self._job.only))}"])
        counts = Counter(case.target for case in cases)
        targets = [
            Target(*target, counts[target], why, self._job.named)
            for target, why in zip(self._job.targets, hello["why_not"], strict=True)
            if counts[target] or why is not None
        ]
        self._record.begin(
            {
                "machine": hello["machine"],
                # Hashed here, once: some packages have hundreds of MB of code.
                "versions": hello["versions"] | sources_of(hello["modules"]),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "seed": self._job.seed,
                "quick": self._job.quick,
                "only": self._job.only,
                "targets": [target.__dict__ for target in targets],
            }
        )
        self._total = len(cases)
        for case in cases:
            earlier = self._record.cases.get(case.key)
            if earlier is None or earlier.status == NOT_RUN:
                (self._alone if case.check == SPEED else self._waiting.setdefault(case.target, [])).append(case)
            elif earlier.status in LOST:
                self._losses[case.target] += 1
        for target in list(self._losses):
            self._leave_out_if_it_kills(target)

    def _hand_out(self) -> None:
        """Give idle workers cases."""
        for worker in self._workers:
            if worker.ready and worker.case is None and (case := self._next(worker)) is not None:
                worker.case, worker.target = case, case.target
                worker.seen.add(case.target)
                worker.process.ask(case.key)

    def _next(self, worker: _Worker) -> CaseResult | None:
        """The next case: of the worker's current implementation, else of the one with the fewest workers. Cheap operators first.

        Every second worker starts with the expensive operators, which take longest.
        """
        with_cases = [target for target, numbers in self._waiting.items() if numbers]
        if with_cases:
            busy = Counter(other.target for other in self._workers if other is not worker and _is_busy(other))
            sign = -1 if worker.from_dear_end else 1
            place = {target: sign * index for index, target in enumerate(with_cases)}
            return self._waiting[min(with_cases, key=lambda target: (target != worker.target, busy[target], place[target]))].pop(0)
        if not self._alone or any(map(_is_busy, self._workers)):
            return None
        has_seen = [other for other in self._workers if other.ready and self._alone[0].target in other.seen]
        return self._alone.pop(0) if not has_seen or worker in has_seen else None

    def _take(self, worker: _Worker, result: CaseResult) -> None:
        """Record a case's result."""
        case, worker.case = worker.case, None
        if result.status == NO_MEMORY:
            if case is not None and (any(map(_is_busy, self._workers)) or any(self._waiting.values())):
                self._alone.append(case)
                return
            result = replace(result, status=SKIPPED, message=f"this device has too little memory for it: {result.message}")
        if result.status == DEVICE_LOST:
            result = replace(result, status=FAILED)
            self._drop(worker)
            self._start(worker.from_dear_end)
        self._add(result)

    def _lose(self, worker: _Worker, lost: Lost) -> None:
        """Handle a worker that crashed or hung, in a case or before one."""
        self._drop(worker)
        if worker.case is not None:
            self._add(replace(worker.case, status=lost.status, message=str(lost), output=lost.output))
            self._losses[worker.case.target] += 1
            self._leave_out_if_it_kills(worker.case.target)
        if worker.ready:
            self._start(worker.from_dear_end)
        elif not self._workers:  # the last case may have broken the device; earlier results are kept
            message = f"the checking process did not start: {lost}\n{lost.output}"
            if self._total is None:
                raise WorkerFailed(message)
            for target in self._job.targets:
                self._leave_out(target, message)

    def _leave_out_if_it_kills(self, target: tuple[str, str]) -> None:
        if self._losses[target] >= _GIVE_UP_AFTER:
            self._leave_out(target, f"{_GIVE_UP_AFTER} cases of this implementation crashed or hung")

    def _leave_out(self, target: tuple[str, str], why: str) -> None:
        speed = [case for case in self._alone if case.target == target]
        self._alone = [case for case in self._alone if case.target != target]
        for case in self._waiting.pop(target, []) + speed:
            self._add(replace(case, status=NOT_RUN, message=f"not run: {why}"))

    def _add(self, result: CaseResult) -> None:
        self._record.add(result, time.monotonic() - self._begun)

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.close()

    def _how_far(self) -> Progress:
        now = time.monotonic()
        if self._total is None:
            return Progress(0, 0, [("", STARTING, now - self._begun)])
        busy = ((worker.process, worker.case) for worker in self._workers if worker.case is not None)
        running = [(f"{case.impl}: {case.full_name}", process.phase, now - process.since) for process, case in busy]
        left = len(running) + len(self._alone) + sum(map(len, self._waiting.values()))
        return Progress(self._total - left, self._total, running)

    def end(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.close()


def _is_busy(worker: _Worker) -> bool:
    return worker.case is not None
