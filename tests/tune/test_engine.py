# SPDX-License-Identifier: Apache-2.0
"""Engines of benchmarks/serving.py and of sglang-fl tune as processes: which run when, and that none stays. What serves is a stand-in."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from serving_lib import rounds

from sglang_fl.tune import engine as engine_module
from sglang_fl.tune.engine import Engine, Engines
from sglang_fl.tune.served import Lengths

#: Answers like engine_worker.py, and has a process below it, as SGLang has.
STAND_IN = """
import json, os, subprocess, sys

replies = os.fdopen(int(sys.argv[1]), "w", buffering=1)
sys.stdin.readline()
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("{}", file=replies)
for line in sys.stdin:
    state = open(f"/proc/{below.pid}/stat").read().rpartition(")")[2].split()[0]
    print(json.dumps({"state_below": state, "seconds": 1, "cached_tokens": 0}), file=replies)
    if json.loads(line)["do"] == "stop":
        print("ended in order", flush=True)
        break
"""

#: A benchmark with a stopped engine, whose processes it names.
BENCHMARK = """
import os, signal, sys
from pathlib import Path
from sglang_fl.tune import engine

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it

engine._WORKER = Path("worker.py").absolute()
engines = engine.Engines([engine.Engine("a", {}, Path("a"), os.environ)])
engines.start(apart=False, seconds=60, on_ready=lambda ready: None)
(a,) = engines.all
a.pause()
print(*a.pids(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    """Two that are up; the test enters them."""
    worker = tmp_path / "worker.py"
    worker.write_text(STAND_IN)
    monkeypatch.setattr(engine_module, "_WORKER", worker)
    found = Engines([Engine(name, {}, tmp_path / name, os.environ) for name in "ab"])
    try:
        found.start(apart=False, seconds=60, on_ready=lambda engine: None)
        assert not found.errors
        yield found
    finally:
        for engine in found.all:
            engine.kill()


def state(pid: int) -> str:
    """Its state in /proc: T is a stopped one's, Z that of one that has ended; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def become(pids: Sequence[int], *states: str) -> bool:
    """Whether all of them get there; they do a moment after a signal."""
    deadline = time.monotonic() + 10
    while not all(state(pid) in states for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def stopped(pids: Sequence[int]) -> bool:
    return become(pids, "T")


def gone(pids: Sequence[int]) -> bool:
    return become(pids, "", "Z")


def running(pids: Sequence[int]) -> bool:
    return all(state(pid) in ("R", "S") for pid in pids)


def test_the_others_are_stopped_while_one_is_measured(engines: Engines) -> None:
    with engines:
        a, b = engines.all
        pids = {engine: engine.pids() for engine in (a, b)}
        assert all(len(pids[engine]) == 2 and running(pids[engine]) for engine in (a, b))
        for measured, other in ((a, b), (b, a), (b, a)):
            with engines.alone(measured):
                assert measured.ask("generate")["state_below"] != "T"
                assert stopped(pids[other]) and running(pids[measured])
        assert stopped(pids[a])
        assert a.ask("generate")["state_below"] != "T" and running(pids[a])


def test_a_round_leaves_those_stopped_that_were_not_the_last(engines: Engines) -> None:
    with engines:
        a, b = engines.all
        found = rounds.run_round(engines, 0, [1], Lengths(prefill=16, decode=4, output=8), 100, seed=0)
        assert {name for seconds in found["seconds"].values() for name in seconds} == {"a", "b"} and not engines.errors
        assert stopped(b.pids()) and running(a.pids())


def test_a_stopped_engine_ends_in_order(engines: Engines) -> None:
    with engines:
        a, b = engines.all
        with engines.alone(a):
            pids = b.pids()
            assert stopped(pids)
    assert "ended in order" in b.last_lines()
    assert gone(pids)


def test_nothing_stays_after_an_interrupt(engines: Engines) -> None:
    a, b = engines.all
    pids = a.pids() + b.pids()
    with pytest.raises(KeyboardInterrupt), engines, engines.alone(a):
        assert stopped(b.pids())
        raise KeyboardInterrupt
    assert gone(pids)


def test_an_engine_that_dies_while_it_is_stopped_is_out_of_the_run(engines: Engines) -> None:
    with engines:
        a, b = engines.all
        with engines.alone(a):
            pids = b.pids()
            assert stopped(pids)
            os.kill(os.getpgid(pids[0]), signal.SIGKILL)
            a.ask("generate")
        with engines.alone(b):
            b.ask("generate")
        assert set(engines.errors) == {"b"} and engines.up == [a]
        assert gone(pids)
        with engines.alone(a):
            a.ask("generate")


def test_processes_that_are_gone_are_no_error(engines: Engines) -> None:
    with engines:
        a, b = engines.all
        for process in [psutil.Process(pid) for pid in b.pids()]:
            process.kill()
        b.wait(time.perf_counter() + 10)
        assert not b.alive()
        with engines.alone(a):
            a.ask("generate")
        with engines.alone(b):
            b.ask("generate")
        assert set(engines.errors) == {"b"}


def test_a_benchmark_that_is_killed_leaves_no_stopped_process(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(STAND_IN)
    environ = {**os.environ, "PYTHONPATH": str(Path(rounds.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", BENCHMARK],
        cwd=tmp_path,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # as a shell's: what adopts its orphans is in another
    ) as benchmark:
        assert benchmark.stdout is not None
        pids = [int(pid) for pid in benchmark.stdout.readline().split()]
        try:
            assert len(pids) == 2 and stopped(pids)
        finally:
            benchmark.kill()
    try:
        assert gone(pids)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
