# SPDX-License-Identifier: Apache-2.0
"""A function that fails in one process alone, in each way: what becomes of this start, and of the next one. Real processes."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from aten_ranks import Start, X
from test_aten_trials import FAILURES

from sglang_fl.trial import TO_TRY_AGAIN
from sglang_fl.trial.record import read_record

RIGHT = torch.nn.functional.silu(torch.nn.functional.silu(X.double())).flatten().tolist()
#: What ends a process -> its exit code, how often it takes that until the next start knows, and what that start says.
DEATHS = {
    "hangs": (1, 1, "its first run did not end within 1 s"),
    "crashes": (-signal.SIGSEGV, 1, "its process ended with 'Segmentation fault' at File"),
    "is killed": (-signal.SIGKILL, 2, "its process was killed 2 times"),
}
#: The records of two ranks: of one host, of two, and where the first has no folder for one (root may write anywhere, but not in a file).
PLACES = {
    "one for both": ["trials.json", "trials.json"],
    "one for each": ["0/trials.json", "1/trials.json"],
    "one for the last": ["file/trials.json", "trials.json"],
}
EXCLUDED = "sglang-fl: excluded, since an earlier start crashed or hung in its first run: "


@dataclass
class Started:
    """By rank: exit codes, what was found, and lines of the log."""

    codes: list[int]
    found: list[dict[str, Any]]
    logs: list[list[str]]

    def warnings(self, about: str) -> list[list[str]]:
        prefix = f"WARNING {about}"
        return [[line.removeprefix("WARNING ") for line in log if line.startswith(prefix)] for log in self.logs]

    def check(self, left: dict[str, str]) -> None:
        """All ranks left the same functions to PyTorch, and have the same right numbers."""
        assert set(self.codes) == {0}, self.logs
        for found in self.found:
            assert found["left"] == left and (found["calls"] == 0) == ("silu" in left)
            assert found["result"] == self.found[0]["result"]
            assert [value for row in found["result"] for value in row] == pytest.approx(RIGHT, abs=1e-6)

    def check_excluded(self, reasons: dict[str, str]) -> None:
        """All ranks left out these functions, for reasons that begin so, and one line of the first says so."""
        excluded = self.found[0]["excluded"]
        assert excluded.keys() == reasons.keys() and all(excluded[name].startswith(reason) for name, reason in reasons.items())
        self.check(excluded)
        listed = "; ".join(f"{name} ({excluded[name]})" for name in sorted(excluded))
        first, *others = self.warnings("sglang-fl: excluded")
        assert first == [f"{EXCLUDED}{listed}. {TO_TRY_AGAIN}"] and not any(others)


Starter = Callable[..., Started]


@pytest.fixture(scope="module")
def ranks() -> Iterator["subprocess.Popen[str]"]:
    """What starts them. It forks, so PyTorch has no threads."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("aten_ranks.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) as process:
        yield process
        process.communicate()


@pytest.fixture
def start(ranks: "subprocess.Popen[str]", tmp_path: Path) -> Starter:
    """Starts ranks whose records are in the test's folder: one a rank."""
    (tmp_path / "file").write_text("")
    folders = (tmp_path / f"start {number}" for number in itertools.count())

    def start(kind: str, records: list[str], **values: Any) -> Started:
        folder = next(folders)
        folder.mkdir()
        assert ranks.stdin is not None and ranks.stdout is not None
        one = Start(str(folder), kind, [str(tmp_path / record) for record in records], **values)
        print(json.dumps(asdict(one)), file=ranks.stdin, flush=True)
        codes = json.loads(ranks.stdout.readline())
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank, code in enumerate(codes) if code == 0]
        return Started(codes, found, [(folder / f"{rank}.log").read_text().splitlines() for rank in range(len(codes))])

    return start


def ends(start: Starter, kind: str, records: list[str], **values: Any) -> str:
    """Start until the next start leaves silu out; returns how its reason begins."""
    code, times, reason = DEATHS[kind]
    for _ in range(times):
        started = start(kind, records, limit=1 if kind == "hangs" else 30, **values)
        assert started.codes[-1] == code and 0 not in started.codes, started.logs
        assert not any(started.warnings("sglang-fl: excluded"))
        if kind == "hangs":
            assert f"CRITICAL sglang-fl: silu: {reason}, so this process ends. The next start excludes it" in started.logs[-1][0]
    return reason


def on_record(path: Path) -> dict[str, int]:
    """Name -> how often it ended a process."""
    return {name: death.count for names in read_record(path).values() for name, death in names.items()}


@pytest.mark.parametrize("where", ["trial", "pass"])
def test_what_is_right_serves_on_both(start: Starter, where: str) -> None:
    start("right", PLACES["one for both"], where=where).check({})


@pytest.mark.parametrize("where", ["trial", "pass"])
@pytest.mark.parametrize("kind", FAILURES)
def test_what_fails_on_one_rank_is_left_out_on_both(start: Starter, tmp_path: Path, kind: str, where: str) -> None:
    why = f"{FAILURES[kind]} on rank 1"
    started = start(kind, PLACES["one for both"], where=where)
    started.check({"silu": why})
    assert started.warnings("") == [[f"ATen operators: silu {why}; using PyTorch's own kernel"], []]
    assert on_record(tmp_path / "trials.json") == {}


@pytest.mark.parametrize("kind", ["synchronises in capture", "allocates on the host"])
def test_what_fails_in_one_ranks_capture_is_left_out_on_both(start: Starter, kind: str) -> None:
    """Between segments the ranks wait for each other: the one that gives up is heard there."""
    started = start(kind, PLACES["one for both"], where="capture")
    started.check({"silu": f"{FAILURES[kind].replace('failed its trial', 'could not be captured')} on rank 1"})
    assert [found["attempts"] for found in started.found] == [3, 3]


@pytest.mark.parametrize("kind", DEATHS)
def test_what_ends_a_process_is_left_out_by_the_next_start(start: Starter, tmp_path: Path, kind: str) -> None:
    reason = ends(start, kind, ["trials.json"], where="pass")
    start(kind, ["trials.json"], where="pass").check_excluded({"silu": reason})
    assert on_record(tmp_path / "trials.json") == {"silu": DEATHS[kind][1]}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", DEATHS)
def test_what_ends_one_rank_is_left_out_on_both_by_the_next_start(start: Starter, tmp_path: Path, kind: str, place: str) -> None:
    """Also where only the other rank's host knows."""
    records = PLACES[place]
    reason = ends(start, kind, records)
    start(kind, records).check_excluded({"silu": reason})
    found = [on_record(tmp_path / record) for record in records]
    assert found == [{"silu": DEATHS[kind][1]} if record == records[-1] else {} for record in records]


def test_all_ranks_leave_out_what_any_of_them_has_on_record(start: Starter, tmp_path: Path) -> None:
    records = PLACES["one for each"]
    reason = ends(start, "crashes", records)
    start("crashes", records).check_excluded({"silu": reason})
    (environment,) = read_record(tmp_path / records[1])
    (tmp_path / records[0]).write_text(json.dumps({environment: {"mul": {"reason": "it hung", "date": "2026-01-01"}}}))
    start("crashes", records).check_excluded({"silu": reason, "mul": "it hung, last on 2026-01-01"})


def test_under_strict_what_ended_one_rank_stops_both(start: Starter) -> None:
    records = PLACES["one for each"]
    ends(start, "crashes", records)
    started = start("crashes", records, strict=True)
    for found in started.found:
        assert found["error"].startswith("sglang-fl: aten::silu: silu ended an earlier start: its process ended with 'Segmentation fault'")
    assert len(started.found) == 2
