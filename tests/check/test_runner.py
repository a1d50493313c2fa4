# SPDX-License-Identifier: Apache-2.0
"""Real worker processes, and implementations that end them."""

import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_functions import reference

from sglang_fl import __version__
from sglang_fl.check import runner
from sglang_fl.check.cases import cases_of
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import (
    COMPILING,
    CRASHED,
    FAILED,
    GRAPH,
    HUNG,
    IN_FLOAT64,
    INPUTS,
    NOT_RUN,
    OK,
    RUNNING,
    SERVING,
    SKIPPED,
    SPEED,
    THREADS,
    TOO_LONG,
)
from sglang_fl.check.implementation import Implementation
from sglang_fl.check.process import Lost
from sglang_fl.check.record import Record
from sglang_fl.check.results import CaseResult, Report
from sglang_fl.config import SettingsError
from sglang_fl.utils.packages import source_hash, sources_of

TIMEOUT = 8.0
_BACKEND = """
    import os, sys, time
    from sglang_fl.dispatch import BackendImplKind, LazyFunction, OpImpl
    from sglang_fl.dispatch.backends.reference.impl.activation import silu_and_mul as right

    def once(x, what):
        import torch
        if x.dtype is not torch.bfloat16 or tuple(x.shape) != (64, 6144):
            return False
        try:
            open(__file__ + what, "x").close()
        except FileExistsError:
            return False
        return True

    def aborts_once(obj, x):
        if once(x, "abort"):
            print("last words", file=sys.stderr, flush=True)
            os.abort()
        return right(obj, x)

    def compiles_too_long(obj, x):
        if once(x, "compile"):
            time.sleep(1000)
        return right(obj, x)

    called = []

    def hangs_once(obj, x):
        if tuple(x.shape) in called and once(x, "hang"):
            time.sleep(1000)
        called.append(tuple(x.shape))
        return right(obj, x)

    def always_exits(obj, x):
        os._exit(3)

    def closes_its_results(obj, x):
        if once(x, "close"):
            os.closerange(3, 64)
            time.sleep(1000)
        return right(obj, x)

    def leaves_a_child(obj, x):
        if once(x, "child"):
            if not os.fork():
                time.sleep(1000)
            os.abort()
        return right(obj, x)

    def wrong(obj, x):
        return right(obj, x) * 1.02

    def for_another_chip(obj, x):
        raise AssertionError("it must not be called")

    for_another_chip._is_available = lambda: False

    def register_builtins(registry):
        def register(op, name, fn, dtypes):
            kind = BackendImplKind.VENDOR
            registry.register_impl(OpImpl(op, f"vendor.{name}", kind, fn, vendor="planted", supported_dtypes=dtypes))

        for fn in (aborts_once, hangs_once, compiles_too_long, always_exits, closes_its_results, leaves_a_child, wrong, for_another_chip):
            register("silu_and_mul", fn.__name__, fn, {"bfloat16"})
        register("silu_and_mul", "float64", right, {"float64"})
        register("silu_and_mul", "not_loaded", LazyFunction("kernels_that_are_not_there", "silu_and_mul"), {"bfloat16"})
        register("sort", "sort", right, None)
"""
_IMPLS = (
    *("aborts_once", "hangs_once", "compiles_too_long", "always_exits", "closes_its_results", "leaves_a_child", "wrong"),
    *("for_another_chip", "float64", "not_loaded"),
)

#: Compiling takes longer than the limit.
_KINDS = (SERVING, INPUTS, THREADS, GRAPH, SPEED)
COMPILED_TOO_LONG = "its first call compiled or tuned for more than 8 s (--compile-timeout)"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    """One run over all of them; compiling is left out, and an implementation is given up after two dead processes."""
    folder = tmp_path_factory.mktemp("backend")
    (folder / "backend_that_kills.py").write_text(textwrap.dedent(_BACKEND))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(runner, "sources_of", hashed)
        patch.setenv("SGLANG_FL_PLUGIN_MODULES", "backend_that_kills")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(runner, "_GIVE_UP_AFTER", 2)
        targets = [*(("silu_and_mul", f"vendor.{name}") for name in _IMPLS), ("sort", "vendor.sort"), ("silu_and_mul", "reference.torch")]
        yield checked(runner.Job(targets, quick=True, seed=7, timeout=TIMEOUT, compile_timeout=TIMEOUT, only=_KINDS, workers=2))


HASHED: list[list[str]] = []


def hashed(modules: list[str]) -> dict[str, str]:
    HASHED.append(modules)
    return sources_of(modules)


def checked(job: runner.Job, record: Record | None = None) -> Report:
    record = record or Record()
    assert runner.check(job, record)
    return record.report()


def of(report: Report, name: str) -> list[CaseResult]:
    return [case for case in report.cases if case.impl in (name, f"vendor.{name}")]


def test_a_crash_is_a_result_and_the_rest_goes_on(report: Report) -> None:
    cases = of(report, "aborts_once")
    (crashed,) = [case for case in cases if case.status not in (OK, SKIPPED)]
    assert (crashed.status, crashed.message) == (CRASHED, "crashed: signal 6 (SIGABRT)")
    assert crashed.check == SERVING and crashed.name == "tokens=64 width=3072"
    assert "last words" in crashed.output and "Fatal Python error: Aborted" in crashed.output
    assert {case.check for case in cases if case.status == OK} >= {SERVING, THREADS, SPEED}
    assert len(cases) == next(row.cases for row in report.rows() if row.impl == "vendor.aborts_once")


def test_a_hang_is_a_result_and_the_rest_goes_on(report: Report) -> None:
    cases = of(report, "hangs_once")
    (hung,) = [case for case in cases if case.status not in (OK, SKIPPED)]
    assert (hung.status, hung.message) == (HUNG, "hung: no response for 8 s while running")
    assert {case.check for case in cases if case.status == OK} >= {SERVING, SPEED}


@pytest.mark.parametrize("name", ["compiles_too_long", "closes_its_results"])
def test_a_first_call_may_take_longer_and_is_said_to_compile(report: Report, name: str) -> None:
    """Also one that closes its results and lives on."""
    (late,) = [case for case in of(report, name) if case.status not in (OK, SKIPPED)]
    assert (late.status, late.message) == (TOO_LONG, COMPILED_TOO_LONG)


def test_a_crash_is_one_though_a_child_lives_on(report: Report) -> None:
    (crashed,) = [case for case in of(report, "leaves_a_child") if case.status not in (OK, SKIPPED)]
    assert (crashed.status, crashed.message) == (CRASHED, "crashed: signal 6 (SIGABRT)")


def test_one_that_always_kills_is_given_up(report: Report) -> None:
    first, second, *others = of(report, "always_exits")
    assert (first.status, first.message) == (second.status, second.message) == (CRASHED, "crashed: exit code 3")
    assert {case.status for case in others} == {NOT_RUN}
    assert others[0].message == "not run: 2 cases of this implementation crashed or hung"


def test_wrong_and_right(report: Report) -> None:
    assert {case.status for case in of(report, "wrong")} >= {FAILED}
    assert {case.status for case in of(report, "reference.torch")} == {OK, SKIPPED}
    assert {case.check for case in of(report, "reference.torch") if case.status == SKIPPED} == {GRAPH}
    assert [case for case in of(report, "wrong") if case.check == SPEED and not (case.time_us and case.reference_us)] == []
    assert {case.dtype for case in of(report, "wrong")} == {"bfloat16"}
    assert {case.dtype for case in of(report, "reference.torch")} == {"bfloat16", "float32", "float16"}


def test_what_cannot_run_is_named_with_the_reason(report: Report) -> None:
    assert {(target.impl, target.why) for target in report.not_available} == {
        ("vendor.for_another_chip", "its availability check returned False"),
        ("vendor.float64", "it supports none of torch.bfloat16, torch.float32, torch.float16"),
        ("vendor.sort", f"sglang-fl {__version__} has no cases for sort"),
    }


def test_a_changed_kernel_is_another_version(report: Report) -> None:
    """A run goes on only with the same versions. The sources are hashed once, though two processes have loaded them."""
    assert len(report.versions["source of backend_that_kills"]) == 12
    assert report.versions["source of backend_that_kills"] != source_hash("a package that is not there")
    (modules,) = HASHED
    assert "backend_that_kills" in modules


def test_one_that_cannot_be_loaded_fails_its_cases_only(report: Report) -> None:
    found = of(report, "not_loaded")
    assert {case.status for case in found} <= {FAILED, SKIPPED}
    messages = {case.message for case in found if case.status == FAILED}
    assert messages and all("No module named 'kernels_that_are_not_there'" in message for message in messages)


def test_the_verdict(report: Report) -> None:
    problems = "\n".join(report.problems())
    for name in ("aborts_once", "hangs_once", "always_exits", "wrong"):
        assert f"silu_and_mul vendor.{name}: " in problems
    assert "reference.torch" not in problems
    assert "silu_and_mul vendor.aborts_once: serving in bfloat16: crashed: 1 of 2" in report.problems()


def test_a_worker_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('no PyTorch today')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with pytest.raises(runner.WorkerFailed, match=r"(?s)did not start: crashed: exit code 1\n.*no PyTorch today"):
        checked(runner.Job([("rms_norm", "reference.torch")], quick=True, seed=0, workers=2))


@pytest.mark.parametrize("op", ["relu2", "fused_moe"])
def test_what_a_case_is_at_is_told(op: str) -> None:
    """Compiling and float64 have limits of their own; the implementation's begins anew after them. Numbers are not compiled for."""
    told: list[str] = []
    cpu = torch.device("cpu")
    impl = Implementation(op, getattr(reference, op), None, cpu, enter=told.append)
    case = next(cases_of(op, None, cpu, quick=True))
    judged = [IN_FLOAT64, RUNNING]
    check_case(impl, case, 3)
    assert told == [*judged, COMPILING, RUNNING, *judged] and impl.compiling_s > 0
    told.clear()
    check_case(impl, case, 4)
    assert told == [*judged, *judged]


def test_another_option_of_the_layer_may_be_compiled_for() -> None:
    told: list[str] = []
    cpu = torch.device("cpu")
    impl = Implementation("topk", reference.topk, None, cpu, enter=told.append)
    cases = {case.name: case for case in cases_of("topk", frozenset({torch.bfloat16}), cpu, quick=True)}
    for name in ("factor=2.5", "factor=2.5 on_output", "factor=2.5"):
        check_case(impl, cases[name], 3)
    assert told.count(COMPILING) == 2


class _Dies:
    """A process whose first case is well, and which then dies; the next does not start."""

    started = 0
    phase, since, open = RUNNING, 0.0, True

    def __init__(self, *arguments: object):
        type(self).started += 1
        self.connection = Connection(os.open(os.devnull, os.O_RDONLY), writable=False)
        cases = [CaseResult(op="relu2", impl="vendor.x", check=SERVING, name=str(number), dtype="bfloat16") for number in range(3)]
        self.answers: list[Any] = [{"cases": cases, "why_not": [None], "machine": {}, "versions": {}, "modules": []}, cases[0]]
        if self.started > 1:
            self.answers = []

    def answer(self) -> Any:
        if self.answers:
            return self.answers.pop(0)
        raise Lost(CRASHED, "crashed: signal 6 (SIGABRT)", "last words")

    def ask(self, case: object) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None:
        self.connection.close()


def test_a_worker_that_does_not_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may take the device with it: what was found until then, that case included, is not lost."""
    monkeypatch.setattr(runner, "Process", _Dies)
    report = checked(runner.Job([("relu2", "vendor.x")], quick=True, seed=0, workers=1))
    assert [case.status for case in report.cases] == [OK, CRASHED, NOT_RUN]
    assert "the checking process did not start: crashed: signal 6" in report.cases[-1].message


def test_a_folder_with_the_name_of_a_module_of_pythons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in the package that new-vendor writes, which has a platform.py."""
    (tmp_path / "platform.py").write_text("raise SystemExit('this is not the platform of Python')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    report = checked(runner.Job([("relu2", "reference.torch")], quick=True, seed=0, only=["relu2 extremes values=zeros dtype=bfloat16"]))
    assert report.verdict == "PASSED" and len(report.cases) == 1


def test_a_budget_ends_it_and_the_record_goes_on(tmp_path: Path) -> None:
    """Nothing that was found is run again, and nothing is left out."""
    file = tmp_path / "run.jsonl"
    job = runner.Job([("relu2", "reference.torch"), ("new_gelu", "reference.torch")], quick=True, seed=5, only=["extremes", "unusual"])
    begun = Record(file)

    def stop(progress: runner.Progress) -> None:
        if progress.done >= 10:
            raise KeyboardInterrupt

    assert not runner.check(job, begun, stop)
    begun.close()
    before = begun.report()
    assert before.verdict == "INCOMPLETE" and 10 <= len(before.cases) < 20
    with file.open("a") as half_a_line:
        half_a_line.write('{"op": "relu2", "im')
    again = Record(file)
    assert again.report().cases == before.cases
    report = checked(job, again)
    again.close()
    assert report.verdict == "PASSED" and report.not_reached == 0
    assert [case for case in report.cases if case in before.cases] == before.cases
    assert Record(file).report() == report and len(file.read_text().splitlines()) == 1 + len(report.cases)


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    first = Record(tmp_path / "run.jsonl")
    with pytest.raises(SettingsError, match=r"run\.jsonl is in use by another sglang-fl check"):
        Record(tmp_path / "run.jsonl")
    first.close()
    Record(tmp_path / "run.jsonl").close()


@pytest.mark.parametrize("line", ['{"format": 99}', '{"format": 1, "seed"'])
def test_a_file_that_is_no_result(tmp_path: Path, line: str) -> None:
    (tmp_path / "other.jsonl").write_text(f"{line}\n")
    with pytest.raises(SettingsError, match="is not a result file of this version of sglang-fl check, or a line of it is damaged"):
        Record(tmp_path / "other.jsonl")


def test_a_run_goes_on_only_as_it_was_begun(tmp_path: Path) -> None:
    header = {"machine": {}, "versions": {"torch": "1"}, "date": "", "seed": 1, "quick": True, "only": [], "targets": []}
    begun = Record(tmp_path / "run.jsonl")
    begun.begin(header)
    with pytest.raises(SettingsError, match=r"versions was \{'torch': '1'\} then, and is \{'torch': '2'\} now"):
        begun.begin({**header, "versions": {"torch": "2"}})


def test_a_full_disk_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did not take is written with the next result, if it takes that."""
    record = Record(tmp_path / "run.jsonl")
    record.begin({"machine": {}, "versions": {}, "date": "", "seed": 1, "quick": True, "only": [], "targets": []})
    case = CaseResult(op="relu2", impl="vendor.x", check=SERVING, name="1", dtype="bfloat16")
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:5], offset))
    record.add(case, 1.0)
    assert record.problem == "No space left on device"
    monkeypatch.setattr(os, "pwrite", write)
    record.add(replace(case, name="2"), 2.0)
    record.close()
    assert record.problem is None
    assert list(Record(tmp_path / "run.jsonl").cases) == list(record.cases)
