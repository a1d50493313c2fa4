# SPDX-License-Identifier: Apache-2.0
"""Real worker processes, and implementations that end them."""

import io
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from backend_functions import reference

from sglang_fl import __version__
from sglang_fl.check import runner
from sglang_fl.check.cases import cases_of
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import COMPILE, CRASHED, FAILED, GRAPH, HUNG, IN_FLOAT64, NOT_RUN, OK, SERVING, SKIPPED, THREADS
from sglang_fl.check.implementation import Implementation
from sglang_fl.check.report import CaseResult, Report

TIMEOUT = 5.0
_BACKEND = """
    import os, sys, time
    from sglang_fl.dispatch import BackendImplKind, OpImpl
    from sglang_fl.dispatch.backends.reference.impl.activation import silu_and_mul as right

    def one_case(x, cols):
        import torch
        return x.dtype is torch.bfloat16 and tuple(x.shape) == (1 if cols == 6144 else 64, cols)

    def aborts_once(obj, x):
        if one_case(x, 6144):
            print("last words", file=sys.stderr, flush=True)
            os.abort()
        return right(obj, x)

    def hangs_once(obj, x):
        if one_case(x, 3072):
            time.sleep(1000)
        return right(obj, x)

    def always_exits(obj, x):
        os._exit(3)

    def closes_its_results(obj, x):
        if one_case(x, 3072):
            os.closerange(3, 64)
            time.sleep(1000)
        return right(obj, x)

    def leaves_a_child(obj, x):
        if one_case(x, 3072):
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

        for fn in (aborts_once, hangs_once, always_exits, closes_its_results, leaves_a_child, wrong, for_another_chip):
            register("silu_and_mul", fn.__name__, fn, {"bfloat16"})
        register("silu_and_mul", "float64", right, {"float64"})
        register("sort", "sort", right, None)
"""
_IMPLS = ("aborts_once", "hangs_once", "always_exits", "closes_its_results", "leaves_a_child", "wrong", "for_another_chip", "float64")

TOO_LONG = "hung: more than 5 s; what compiles or tunes at its first call may need a longer --timeout"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    """One run over all of them; compiling is left out, and an implementation is given up after two dead processes."""
    folder = tmp_path_factory.mktemp("backend")
    (folder / "backend_that_kills.py").write_text(textwrap.dedent(_BACKEND))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("SGLANG_FL_PLUGIN_MODULES", "backend_that_kills")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(runner, "_GIVE_UP_AFTER", 2)
        targets = [*(("silu_and_mul", f"vendor.{name}") for name in _IMPLS), ("sort", "vendor.sort"), ("silu_and_mul", "reference.torch")]
        yield runner.check(runner.Job(targets, quick=True, seed=7, timeout=TIMEOUT))


def of(report: Report, name: str) -> list[CaseResult]:
    return [case for case in report.cases if case.impl in (name, f"vendor.{name}")]


def test_a_crash_is_a_row_and_the_rest_goes_on(report: Report) -> None:
    cases = of(report, "aborts_once")
    (crashed,) = [case for case in cases if case.status not in (OK, SKIPPED)]
    assert (crashed.status, crashed.message) == (CRASHED, "crashed: signal 6 (SIGABRT)")
    assert crashed.check == SERVING and crashed.name == "1 × 2·3072"
    assert "last words" in crashed.output and "Fatal Python error: Aborted" in crashed.output
    assert {case.check for case in cases if case.status == OK} >= {SERVING, THREADS, COMPILE}


def test_a_hang_is_a_row_and_the_rest_goes_on(report: Report) -> None:
    cases = of(report, "hangs_once")
    (hung,) = [case for case in cases if case.status not in (OK, SKIPPED)]
    assert (hung.status, hung.message, hung.name) == (HUNG, TOO_LONG, "64 × 2·1536")
    assert cases[-1].check == COMPILE and cases[-1].status == OK


def test_one_that_closes_its_results_and_lives_on_has_hung(report: Report) -> None:
    (hung,) = [case for case in of(report, "closes_its_results") if case.status not in (OK, SKIPPED)]
    assert (hung.status, hung.message) == (HUNG, TOO_LONG)


def test_a_crash_is_one_though_a_child_lives_on(report: Report) -> None:
    (crashed,) = [case for case in of(report, "leaves_a_child") if case.status not in (OK, SKIPPED)]
    assert (crashed.status, crashed.message) == (CRASHED, "crashed: signal 6 (SIGABRT)")


def test_one_that_always_kills_is_given_up(report: Report) -> None:
    first, second, *others = of(report, "always_exits")
    assert (first.status, first.message) == (second.status, second.message) == (CRASHED, "crashed: exit code 3")
    assert {case.status for case in others} == {NOT_RUN}
    assert others[0].message == "not run: 2 cases of this implementation have ended their process"


def test_wrong_and_right(report: Report) -> None:
    assert {case.status for case in of(report, "wrong")} >= {FAILED}
    assert {case.status for case in of(report, "reference.torch")} == {OK, SKIPPED}
    assert {case.check for case in of(report, "reference.torch") if case.status == SKIPPED} == {GRAPH}
    assert {case.dtype for case in of(report, "wrong")} == {"bfloat16"}
    assert {case.dtype for case in of(report, "reference.torch")} == {"bfloat16", "float32", "float16"}


def test_what_cannot_run_is_named_with_the_reason(report: Report) -> None:
    assert {(row["impl"], row["why"]) for row in report.not_available} == {
        ("vendor.for_another_chip", "its availability check says no"),
        ("vendor.float64", "it takes none of torch.float32, torch.bfloat16, torch.float16"),
        ("vendor.sort", f"sglang-fl {__version__} has no operator sort, and so no check of it"),
    }


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
        runner.check(runner.Job([("rms_norm", "reference.torch")], quick=True, seed=0, timeout=TIMEOUT))


def test_float64_is_not_the_implementations_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the worker computes what is exact another limit holds, and the implementation's begins anew after that."""
    worker = object.__new__(runner._Worker)
    worker._process = cast(Any, SimpleNamespace(stdin=io.StringIO()))
    sent: list[dict[str, Any]] = []
    cpu = torch.device("cpu")
    impl = Implementation("relu2", reference.relu2, None, cpu, in_float64=lambda begins: sent.append({IN_FLOAT64: begins}))
    check_case(impl, next(cases_of("relu2", None, cpu, quick=True)), 3)
    assert sent == [{IN_FLOAT64: True}, {IN_FLOAT64: False}]
    answers, limits = [*sent, {"status": OK}], []
    monkeypatch.setattr(worker, "read", lambda limit: (limits.append(limit), answers.pop(0))[1])
    assert worker.ask(0, 5.0) == {"status": OK}
    assert limits == [5.0, runner._FLOAT64_LIMIT, 5.0]


def test_a_worker_that_does_not_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may take the device with it: what was found until then, that case included, is not lost."""
    cases = [{"target": 0, "check": SERVING, "name": str(number), "dtype": "bfloat16"} for number in range(3)]
    started: list[runner.Job] = []

    class Worker:
        def ask(self, number: int, limit: float) -> dict[str, Any]:
            if number:
                raise runner._Ended(CRASHED, "crashed: signal 6 (SIGABRT)", "last words")
            return {"status": OK, "broken": False}

        def end(self) -> None:
            pass

    def start(job: runner.Job) -> tuple[Any, dict[str, Any]]:
        started.append(job)
        if len(started) > 1:
            raise runner.WorkerFailed("the checking process did not start: no device")
        return Worker(), {"cases": cases, "why_not": [None], "machine": {}, "versions": {}}

    monkeypatch.setattr(runner, "_start", start)
    report = runner.check(runner.Job([("relu2", "vendor.x")], quick=True, seed=0, timeout=TIMEOUT))
    assert [case.status for case in report.cases] == [OK, CRASHED, NOT_RUN]
    assert report.cases[-1].message == "not run: the checking process did not start: no device"


def test_a_folder_with_the_name_of_a_module_of_pythons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in the package that new-vendor writes, which has a platform.py."""
    (tmp_path / "platform.py").write_text("raise SystemExit('this is not the platform of Python')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    worker, hello = runner._start(runner.Job([("relu2", "reference.torch")], quick=True, seed=0, timeout=TIMEOUT))
    worker.end()
    assert hello["cases"]


@pytest.mark.parametrize(
    ("threads", "waited"),
    [
        ([(5.0, 5.0)], 5.0),  # others had half of its processor
        ([(5.0, 5.0), (5.0, 5.0)], 5.0),  # and of both
        ([(1.25, 8.75)] * 16, 0.0),  # its own threads wait for each other
        ([(10.0, 0.0)], 0.0),
        ([(0.0, 0.0)], 0.0),
    ],
)
def test_only_what_others_take_is_waiting(monkeypatch: pytest.MonkeyPatch, threads: list[tuple[float, float]], waited: float) -> None:
    worker = object.__new__(runner._Worker)
    now = {str(number): (100 + ran, 100 + waits) for number, (ran, waits) in enumerate(threads)}
    monkeypatch.setattr(worker, "_on_processors", lambda: now)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert worker._kept_waiting(dict.fromkeys(now, (100.0, 100.0)), 10.0) == waited
