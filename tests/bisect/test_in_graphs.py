# SPDX-License-Identifier: Apache-2.0
"""Faults that are only in graphs: on the CPU, as a chip with graphs of decode steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import planted_faults
import planted_gems
import pytest
from graphs_on_cpu import ARGUMENTS as GRAPHS
from graphs_on_cpu import install

from sglang_fl.bisect.in_graphs import differences
from sglang_fl.bisect.model import ARGUMENTS, FOUND, NO_DIFFERENCE, Job, Report, about, bisect, bisect_loaded
from sglang_fl.bisect.passes import AGAIN, in_graphs, read_trace
from sglang_fl.bisect.report import effects
from sglang_fl.bisect.trials import Effect
from sglang_fl.cli.demo_model import RECITAL, demo_model
from sglang_fl.config import Settings
from sglang_fl.model_run import Batch, Crashed, LoadedModel, ModelRun

JOB = Job("demo", Settings(), prompts=(RECITAL[:84], RECITAL[84:180]))
SILU = "SiluAndMul → vendor.planted: the output changes with only this on, and is right with only this off."


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    environ = {**install(tmp_path_factory.mktemp("chip"), planted_faults.ENVIRON), "OMP_NUM_THREADS": "1"}
    with LoadedModel(str(demo_model()), [*ARGUMENTS, *GRAPHS, "--dtype", "float32"], environ) as model:
        yield model


def found_with(loaded: LoadedModel, fault: str) -> Report:
    loaded.call(planted_faults.plant, fault)
    return bisect_loaded(loaded, JOB, lambda line: None)


@pytest.mark.e2e
def test_right_implementations_are_right_in_graphs(loaded: LoadedModel) -> None:
    report = found_with(loaded, "")
    assert (report.verdict, report.facts["graphs"]) == (NO_DIFFERENCE, "decode"), report.message
    assert report.in_graphs is not None and "In graphs (decode) log-probabilities change by up to" in report.message


@pytest.mark.e2e
@pytest.mark.parametrize(
    "fault, replays",
    [
        ("stale pointer", "in every replay (batches: one, batch of 12, long)"),
        ("first replay", "only in the first replays"),
        pytest.param("later replays", "only in replays after the first", marks=pytest.mark.slow),
    ],
)
def test_a_fault_that_is_only_in_graphs_is_named(loaded: LoadedModel, fault: str, replays: str) -> None:
    report = found_with(loaded, fault)
    assert (report.verdict, [str(one) for one in report.culprits]) == (FOUND, ["SiluAndMul → vendor.planted"]), report.message
    assert report.message.startswith(f"Only in graphs: {SILU} It is seen in decode, ") and replays in report.message
    assert len(report.trials) <= 10
    assert ("only SiluAndMul → vendor.planted, in graphs", "changes") in [(what, result) for what, _, result in effects(report)]


@pytest.mark.e2e
@pytest.mark.slow
def test_graphs_that_cannot_be_captured_are_reported(loaded: LoadedModel) -> None:
    report = found_with(loaded, "raises in a capture")
    assert report.verdict == NO_DIFFERENCE
    assert "Graphs could not be captured: " in report.message and "StreamCaptureUnsupported: operation not" in report.message


@pytest.mark.e2e
def test_graphs_that_are_never_replayed_prove_nothing(loaded: LoadedModel) -> None:
    """SGLang may run a batch without its graphs."""
    loaded.call(planted_faults.plant, "")
    _, _, given = loaded.call(about, list(JOB.prompts))[0]
    assert loaded.call(in_graphs, given[:1], ())[0][0] == ("decode",)
    loaded.call(up_to, 0)
    try:
        assert loaded.call(in_graphs, given[:1], ())[0][0] == ()
    finally:
        loaded.call(up_to, 1 << 20)


def up_to(run: ModelRun, batch: int) -> None:
    planted_gems.largest_graph = batch


@pytest.mark.e2e
def test_what_runs_when_a_capture_crashes_is_known(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.call(planted_faults.plant, "crash in a capture")
    _, _, given = loaded.call(about, list(JOB.prompts))[0]
    with pytest.raises(Crashed, match=r"SIGSEGV"):
        loaded.call(in_graphs, given, None, str(tmp_path))
    assert read_trace(tmp_path) == ("silu (FlagGems, silu)", "aten::silu, no batch, the capture of a graph")


@pytest.mark.e2e
@pytest.mark.slow
def test_a_fault_that_takes_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = install(tmp_path, {**planted_faults.ENVIRON, "OMP_NUM_THREADS": "1", "PLANTED_FAULT": "stale pointer of two ranks"})
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    job = Job(str(demo_model()), Settings(), (*GRAPHS, "--dtype", "float32", "--tp", "2"), JOB.prompts)
    report = bisect(job, lambda line: None)
    assert (report.verdict, [one.name for one in report.culprits], report.loads) == (FOUND, ["SiluAndMul"], 2), report.message
    assert "It needs several ranks: with --tp 1 the output does not change." in report.message


BATCHES = [Batch("one", ((0,) * 9,), 2), Batch("many", ((0,) * 9,) * 3, 2), Batch("long", ((0,) * 20,), 2)]


def logprobs(*changed: tuple[str, int]) -> dict[str, Any]:
    found = {f"{batch.name}{again}": np.zeros((3, len(batch.sequences))) for batch in BATCHES for again in ("", AGAIN)}
    for name, step in changed:
        found[name][step, -1] = 0.5
    return found


@pytest.mark.parametrize(
    "changed, said",
    [
        ([("one", 1), ("one, again", 1)], "in decode, in every replay (batches: one)"),
        ([("one", 0), ("one, again", 0)], "in prefill, in every replay (batches: one)"),
        ([("many", 1)], "in decode, only in the first replays (batches: many)"),
        ([("long", 1), ("one, again", 1)], "in decode, only in replays after the first (batches: one, long)"),
        ([("many", 2), ("many, again", 1)], "in decode, only in replays after the first (batches: many)"),
    ],
)
def test_which_replays_and_batches(changed: list[tuple[str, int]], said: str) -> None:
    assert differences(logprobs(), logprobs(*changed), Effect(), BATCHES, ("prefill", "decode")) == f"It is seen {said}."
