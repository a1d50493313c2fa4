# SPDX-License-Identifier: Apache-2.0
"""All ranks use FlagCX, or none does: one decision for all, through a store of torch.distributed.

Each rank writes its answer under its own key and waits for the others. The first rank that has all answers, or times
out, writes the decision with compare-and-set. All ranks follow it, so that two ranks never decide differently, even if
an answer arrives at the last moment.
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError

from .device_communicators.flagcx import Version
from .device_communicators.flagcx_files import FlagCXError

#: How long the ranks wait for each other, in seconds.
LIMIT = 30.0
#: The part of that time for the initialization of a communicator.
_INIT_SHARE = 25 / 30
#: How long the rank that holds the store waits for the others to read that all stop; silent ones never do.
_ACKNOWLEDGE_LIMIT = 5.0
_DECISION, _FAILED, _ACKNOWLEDGED = "decision", "failed", "acknowledged"
#: FlagCX's own variables that decide how ranks talk to each other. (Interfaces, devices and logs may differ between nodes.)
_SHARED_VARIABLE = re.compile(r"FLAGCX_(USE_\w+|UNIRUNNER_\w+|C2C_ALGO|CUSTOM_OP_ENABLE)")
#: Values of ``_FAILED``: a rank has an error, or it timed out.
_ERROR, _LATE = b"error", b"late"


@dataclass(frozen=True)
class Answer:
    """A rank's answer.

    ``chosen_by``: the setting that chose FlagCX, as ``variable=value``. ``problem``: why it cannot be used.
    ``strict``: stop instead of falling back. ``variables``: FlagCX's variables that must be equal on all ranks.
    """

    host: str
    chosen_by: str
    strict: bool
    version: dict[str, Any] | None = None
    problem: str | None = None
    variables: dict[str, str] = field(default_factory=dict)


def shared_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The set ones of FlagCX's variables that must be equal on all ranks."""
    return {name: value for name, value in environ.items() if _SHARED_VARIABLE.fullmatch(name)}


@dataclass(frozen=True)
class Decision:
    """The decision of all ranks: use FlagCX if ``reason`` is None, else stop or fall back."""

    reason: str | None = None
    stop: bool = False


class Agreement:
    """One decision of all ranks, with its own keys in the store."""

    def __init__(self, store: Store, name: str, rank: int, world_size: int, limit: float):
        self._store = store
        self._name = name
        self._rank = rank
        self._world_size = world_size
        self._limit = limit
        self._deadline = time.monotonic() + limit

    def _key(self, what: object) -> str:
        return f"sglang_fl/{self._name}/{what}"

    def decide(self, answer: Answer, late: bool = False) -> Decision:
        """Give this rank's answer, wait for the others' and return the decision of all.

        Args:
            late: the answer's problem is a timeout of this rank.

        Raises:
            RuntimeError: the store is gone, because its process has ended.
        """
        if answer.problem is not None:
            self._store.set(self._key(_FAILED), (_LATE if late else _ERROR).decode())
        self._store.set(self._key(self._rank), json.dumps(asdict(answer)))
        proposal = _judge(self._answers(), self._world_size, self._limit)
        decided = self._store.compare_set(self._key(_DECISION), "", json.dumps(asdict(proposal)))
        decision = Decision(**json.loads(decided))
        if decision.stop:
            self._acknowledge()
        return decision

    def _acknowledge(self) -> None:
        """Wait before stopping: rank 0's process may hold the store, and the others must read the decision first."""
        self._store.set(self._key(f"{_ACKNOWLEDGED}/{self._rank}"), "1")
        if self._rank == 0:
            with contextlib.suppress(DistStoreError):
                self._store.wait(
                    [self._key(f"{_ACKNOWLEDGED}/{rank}") for rank in range(self._world_size)], timedelta(seconds=_ACKNOWLEDGE_LIMIT)
                )

    def failure(self) -> bytes:
        """``_ERROR`` or ``_LATE`` if a rank had a problem, else empty."""
        key = self._key(_FAILED)
        return self._store.get(key) if self._store.check([key]) else b""

    def _answers(self) -> dict[int, Answer]:
        keys = [self._key(rank) for rank in range(self._world_size)]
        with contextlib.suppress(DistStoreError):  # some rank is silent: read the others one by one
            self._store.wait(keys, timedelta(seconds=max(0.1, self._deadline - time.monotonic())))
        return {rank: Answer(**json.loads(self._store.get(key))) for rank, key in enumerate(keys) if self._store.check([key])}

    def initialize(self, answer: Answer, identity: Callable[[], bytes], join: Callable[[bytes], Any]) -> tuple[Decision, Any]:
        """Initialize a communicator on all ranks, in a thread: if one rank fails, the others' calls never return.

        The initialization gets less than the whole time limit; the rest is for reporting.

        Args:
            answer: this rank's answer, to which a problem is added.
            identity: creates the communicator's id; called on rank 0.
            join: creates the communicator from the id, and tries it.

        Returns:
            the decision of all ranks, and what ``join`` returned on this one.
        """
        limit = self._limit * _INIT_SHARE
        outcome: list[Any] = []
        problems: list[str] = []

        def attempt(step: Callable[[], Any]) -> Any:
            try:
                return step()
            except Exception as error:  # the other ranks must learn of any error
                problems.append(str(error) if isinstance(error, FlagCXError) else f"{type(error).__name__}: {error}")

        late = False
        # The store serves one caller at a time, so the thread below must not wait for it.
        shared = attempt(lambda: self._share(identity, limit))
        if shared:
            thread = threading.Thread(target=lambda: attempt(lambda: outcome.append(join(shared))), name="flagcx-init", daemon=True)
            thread.start()
            deadline = time.monotonic() + limit
            while thread.is_alive() and time.monotonic() < deadline and not self.failure():
                thread.join(0.1)
            # If a rank has an error, the others time out too: only the rank with the error, or the one that hangs, is reported.
            late = thread.is_alive() and self.failure() != _ERROR
            if late:
                problems.append(f"its communicator was not initialized within {limit:.0f} s")
        if problems:
            answer = Answer(**{**asdict(answer), "problem": problems[0]})
        return self.decide(answer, late), outcome[0] if outcome else None

    def _share(self, identity: Callable[[], bytes], limit: float) -> bytes:
        """The id from rank 0. Empty if it failed."""
        key = self._key("unique_id")
        if self._rank == 0:
            made = b""
            try:
                made = identity()
            finally:
                self._store.set(key, made.hex())
            return made
        self._store.wait([key], timedelta(seconds=limit))
        return bytes.fromhex(self._store.get(key).decode())


def _judge(answers: dict[int, Answer], world_size: int, limit: float) -> Decision:
    """The decision from the answers given within ``limit`` seconds; the reason names each rank that prevents FlagCX."""
    silent = [rank for rank in range(world_size) if rank not in answers]
    failed = {rank: answer for rank, answer in answers.items() if answer.problem is not None}
    reasons = []
    if silent:
        settings = _ranks_by({rank: answer.chosen_by for rank, answer in answers.items()})
        chosen = "; ".join(f"{format_ranks(ranks)} by {setting}" for setting, ranks in settings.items())
        reasons.append(
            f"{format_ranks(silent)} did not answer within {limit:.0f} s, so FlagCX was not chosen there or the process is stuck "
            f"(chosen on {chosen}; set SGLANG_FL_DIST_BACKEND=flagcx or FLAGCX_PATH on every node, or on none)"
        )
    reasons += [f"rank {rank} on {answer.host} ({answer.chosen_by}): {answer.problem}" for rank, answer in failed.items()]
    versions = {rank: Version(**answer.version) for rank, answer in answers.items() if answer.version is not None}
    reasons += _different_versions(versions, answers)
    reasons += _different_variables(answers)
    stop = any(answer.strict for answer in answers.values())
    return Decision("; ".join(reasons), stop) if reasons else Decision()


def _different_versions(versions: dict[int, Version], answers: dict[int, Answer]) -> list[str]:
    # Compare with a rank that knows its release: one without a header agrees with any.
    ordered = sorted(versions.items(), key=lambda item: item[1].header is None)
    for rank, version in ordered[1:]:
        first, reference = ordered[0]
        if not version.agrees(reference):
            return [
                f"rank {first} on {answers[first].host} has FlagCX {reference} by {answers[first].chosen_by}, "
                f"rank {rank} on {answers[rank].host} has {version} by {answers[rank].chosen_by}"
            ]
    return []


def _different_variables(answers: dict[int, Answer]) -> list[str]:
    differences = []
    given = {rank: answer.variables for rank, answer in answers.items()}
    for name in sorted({name for variables in given.values() for name in variables}):
        values = _ranks_by({rank: variables.get(name) for rank, variables in given.items()})
        if len(values) > 1:
            where = []
            for value, ranks in values.items():
                hosts = ", ".join(dict.fromkeys(answers[rank].host for rank in ranks))
                where.append(f"{'not set' if value is None else repr(value)} on {format_ranks(ranks)} ({hosts})")
            differences.append(f"{name} must be the same on all ranks, and is {', '.join(where)}")
    return differences


def _ranks_by(values: dict[int, Any]) -> dict[Any, list[int]]:
    """Value -> the ranks that have it."""
    ranks: dict[Any, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return ranks


def format_ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def absent_ranks(store: Store, rank: int, world_size: int, timeout: timedelta) -> list[int]:
    """Wait for all ranks of a group to call this; returns those that have not when the time is up."""
    keys = [f"sglang_fl/arrived/{other}" for other in range(world_size)]
    store.set(keys[rank], "1")
    deadline = time.monotonic() + timeout.total_seconds()
    while not store.check(keys) and time.monotonic() < deadline:
        with contextlib.suppress(DistStoreError):  # one second at a time, so that Ctrl-C works
            store.wait(keys, timedelta(seconds=1))
    return [other for other, key in enumerate(keys) if not store.check([key])]
