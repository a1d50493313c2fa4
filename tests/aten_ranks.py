# SPDX-License-Identifier: Apache-2.0
"""Starts of a server's ranks without an engine; FlagGems's silu fails on the last of them alone.

python aten_ranks.py reads starts, one a line, and prints each one's exit codes, by rank. It forks the ranks: importing PyTorch takes
seconds. A rank leaves ``<rank>.json``, with what came of its model, and ``<rank>.log`` in the start's folder.
"""

import atexit
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planted_gems
import torch
from aten_backend import Backend, Group, recording
from settings_loader import CPU

from sglang_fl.aten import AtenOperators, capture, scope, trials
from sglang_fl.aten.trials import Trials
from sglang_fl.bind import _excluded
from sglang_fl.config import Settings
from sglang_fl.distributed.ranks import Ranks

X = torch.linspace(-3, 3, 12).reshape(3, 4)
#: A rank that waits for ever ends.
DEADLINE = 30


@dataclass(frozen=True)
class Start:
    """
    Attributes:
        kind: of silu on the last rank, of ``planted_gems.KINDS``.
        records: each rank's file of what ended earlier starts.
        where: silu fails first in its trial before a graph is captured (``trial``), in SGLang's capture (``capture``), or in the model's
            first passes (``pass``).
        limit: seconds of a first run.
    """

    folder: str
    kind: str
    records: list[str]
    where: str = "trial"
    limit: float = DEADLINE
    strict: bool = False


def main() -> None:
    for line in sys.stdin:
        start = Start(**json.loads(line))
        pids = [_fork(start, rank) for rank in range(len(start.records))]
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:  # as SGLang does
                for other in set(pids) - codes.keys():
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


def _fork(start: Start, rank: int) -> int:
    if pid := os.fork():
        return pid
    signal.alarm(DEADLINE)
    at = Path(start.folder, str(rank))
    with at.with_suffix(".log").open("wb") as log:
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", force=True)
    at.with_suffix(".json").write_text(json.dumps(_serve(start, rank)))
    atexit._run_exitfuncs()
    os._exit(0)  # to take PyTorch apart takes longer than all before


def _serve(start: Start, rank: int) -> dict[str, Any]:
    count = len(start.records)
    torch.distributed.init_process_group("gloo", init_method=f"file://{start.folder}/store", rank=rank, world_size=count)
    group = Group(count, rank, torch.distributed.group.WORLD)
    settings = Settings(trial_record=start.records[rank], trial_limit=start.limit, strict=start.strict)
    excluded = _excluded(settings, CPU, Ranks(group))
    silu = planted_gems.KINDS[start.kind] if rank == count - 1 else planted_gems.silu
    _let_the_device_capture()
    with planted_gems.in_place_of_flaggems(planted_gems.gems(silu)):
        operators = AtenOperators(settings, Trials(captures_graphs=start.where != "capture"), excluded)
        try:
            run = _passes if start.where == "pass" else _captures
            return {"excluded": excluded, **run(operators, group), "left": {name: why for _, name, why in operators.report.left}}
        except RuntimeError as error:
            if not start.strict:
                raise
            return {"error": str(error)}


def _let_the_device_capture() -> None:
    """Its state is a variable, and SGLang's barriers, as the hook on them meets them."""

    def capture_and_discard(function: Callable[[], Any], device: torch.device) -> None:
        with recording():
            function()

    for module in (trials, capture):
        module.is_capturing = lambda: planted_gems.capturing  # type: ignore[attr-defined]
    trials.capture_and_discard = capture_and_discard
    own = Group.barrier
    Group.barrier = lambda self: scope._barrier(own, self)  # type: ignore[method-assign]


def _captures(operators: AtenOperators, group: Group) -> dict[str, Any]:
    """Two graphs: how many attempts they took, and the last one's numbers, and how often it called FlagGems's silu."""
    backend = Backend(group)
    operators.enable()
    operators.disable()
    for shape in (2, 1):
        planted_gems.calls.clear()
        scope._in_graphs = (operators, Ranks())
        scope._capture_one(backend, backend.capture_one, shape, lambda: _model(backend))
    return {"attempts": backend.attempts, "calls": planted_gems.calls.get("silu", 0), "result": backend.graphs[1].tolist()}


def _passes(operators: AtenOperators, group: Group) -> dict[str, Any]:
    """Two passes: the last one's numbers, and how often it called FlagGems's silu."""
    with operators:
        first_passes = scope.FirstPasses(operators, Ranks(group))
        for _ in range(2):
            planted_gems.calls.clear()
            result = _model(Backend(group))
            first_passes.passed()
    return {"calls": planted_gems.calls.get("silu", 0), "result": result.tolist()}


def _model(backend: Backend) -> torch.Tensor:
    first = torch.nn.functional.silu(X)
    backend.between(lambda: torch.distributed.all_reduce(first.clone()))
    return torch.nn.functional.silu(first)


if __name__ == "__main__":
    main()
