# SPDX-License-Identifier: Apache-2.0
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sglang_fl.check.constants import FAILED, OK, SERVING
from sglang_fl.check.record import Record
from sglang_fl.check.results import CaseResult
from sglang_fl.check.runner import Job, Progress, WorkerFailed
from sglang_fl.cli import main
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.kernels.reference import REFERENCES

Cli = Callable[..., "pytest.CaptureResult[str]"]
REFERENCE = [(op, "reference.torch") for op in sorted({*OPERATORS, *REFERENCES})]
ALLOC = ("sglang.kernels.ops.memory.allocator:alloc_decode_kernel", "reference.torch")
HEADER = {"machine": {"device": "cpu", "vendor": "cpu (a test)"}, "versions": {}, "date": "2026-01-02T03:04:05+00:00"}
RMS_NORM, SILU_AND_MUL = ("rms_norm", "reference.torch"), ("silu_and_mul", "reference.torch")


def case_result(status: str, op: str, impl: str, message: str) -> CaseResult:
    return CaseResult(status, message, op=op, impl=impl, check=SERVING, name="1 × 8", dtype="bfloat16")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What would be checked; nothing is."""
    asked: list[Job] = []

    def check(job: Job, record: Record, progress: Callable[[Progress], None]) -> bool:
        asked.append(job)
        progress(Progress(0, 1, [("[/x]", "running", 0.0)]))
        targets = [{"op": op, "impl": impl, "cases": 1, "why": None, "named": job.named} for op, impl in job.targets]
        record.begin({**HEADER, "seed": job.seed, "quick": job.quick, "only": job.only, "targets": targets})
        for op, impl in job.targets:
            status = FAILED if impl == "vendor.testchip" else OK
            record.add(case_result(status, op, impl, "a message"), 1.0)
        return True

    monkeypatch.setattr("sglang_fl.cli.check.check", check)
    return asked


def test_everything_by_default(jobs: list[Job]) -> None:
    assert main(["check"]) == 0
    (job,) = jobs
    assert set(REFERENCE) <= set(job.targets) and ("rms_norm", "vendor.cuda") in job.targets
    assert (job.quick, job.timeout) == (False, 60.0)


@pytest.mark.parametrize(
    ("argv", "targets"),
    [
        (["--impl", "reference.torch"], REFERENCE),
        (["--op", "rms_norm", "--impl", "reference.torch"], [RMS_NORM]),
        (["--op", "rms_norm", "--op", "silu_and_mul", "--impl", "reference.torch"], [RMS_NORM, SILU_AND_MUL]),
        (["--op", "alloc_decode_kernel"], [ALLOC]),
        (["--op", ALLOC[0]], [ALLOC]),
        (["--vendor", "testchip"], [("rms_norm", "vendor.testchip")]),
        (["--vendor", "TestChip", "--impl", "reference.torch", "--op", "rms_norm"], [RMS_NORM, ("rms_norm", "vendor.testchip")]),
    ],
)
def test_what_is_asked_for(
    jobs: list[Job], backend: Callable[..., str], monkeypatch: pytest.MonkeyPatch, argv: list[str], targets: list[tuple[str, str]]
) -> None:
    monkeypatch.setenv("SGLANG_FL_PLUGIN_MODULES", backend())
    main(["check", *argv])
    assert sorted(jobs[0].targets) == sorted(targets)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--op", "rms_nrom"], "--op: there is no operator 'rms_nrom'; did you mean 'rms_norm'?"),
        (["--impl", "vendor.cud"], "--impl: there is no implementation 'vendor.cud'; did you mean 'vendor.cuda'?"),
        (["--vendor", "nvidai"], "--vendor: there is no vendor 'nvidai'; did you mean 'nvidia'?"),
        (["--op", "silu_and_mul", "--impl", "vendor.testchip"], "silu_and_mul has no implementation vendor.testchip"),
        (["--op", "rms_norm", "--op", "silu_and_mul", "--vendor", "testchip"], "check: silu_and_mul has no implementation testchip"),
        (["--op", "topk", "--impl", "reference.torch", "--impl", "vendor.testchip"], "check: vendor.testchip has no topk"),
        (["--html", "/nowhere/at/all.html"], "--html: '/nowhere/at/all.html' cannot be written"),
    ],
)
def test_names_that_nothing_has(jobs: list[Job], cli: Cli, backend: Callable[..., str], argv: list[str], told: str) -> None:
    printed = cli("check", *argv, code=2, SGLANG_FL_PLUGIN_MODULES=backend())
    assert told in printed.err and printed.out == ""
    assert jobs == []


def test_a_failure_is_exit_code_1(jobs: list[Job], cli: Cli, backend: Callable[..., str]) -> None:
    printed = cli("check", "--vendor", "testchip", code=1, SGLANG_FL_PLUGIN_MODULES=backend())
    assert "rms_norm vendor.testchip, serving, bfloat16: 1 × 8: a message" in printed.out


def test_json_and_page(jobs: list[Job], tmp_path: Path, cli: Cli) -> None:
    page = tmp_path / "report.html"
    options = ("--json", "--html", str(page), "--seed", "9", "--quick", "--timeout", "1.5m")
    data = json.loads(cli("check", "--impl", "reference.torch", *options).out)
    assert data["ok"] is True and data["seed"] == 9 and data["quick"] is True and len(data["cases"]) == len(REFERENCE)
    assert jobs[0].timeout == 90.0
    assert "PASSED" in page.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_costs_nothing_else(jobs: list[Job], cli: Cli) -> None:
    captured = cli("check", "--op", "rms_norm", "--impl", "reference.torch", "--html", "/dev/full", code=1)
    assert "PASSED" in captured.out and "--html: [Errno 28] No space left on device" in captured.err


def test_what_is_no_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli) -> None:
    """Messages are the implementation's: a file's name in one may be any bytes."""
    message = "no file lib\udcff.so"

    def check(job: Job, record: Record, progress: object) -> bool:
        target = {"op": "rms_norm", "impl": "reference.torch", "cases": 1}
        record.begin({**HEADER, "seed": 0, "quick": True, "only": [], "targets": [target]})
        record.add(case_result(FAILED, "rms_norm", "reference.torch", message), 1.0)
        return True

    monkeypatch.setattr("sglang_fl.cli.check.check", check)
    printed = cli("check", "--json", "--html", "~/report.html", code=1, HOME=str(tmp_path))
    assert json.loads(printed.out.encode())["cases"][0]["message"] == message
    assert "no file lib\\udcff.so" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_terminal_without_our_characters(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["check", "--op", "rms_norm", "--impl", "reference.torch"]) == 0
    assert b"PASSED" in written.getvalue() and b"\\u2014" in written.getvalue()


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999", "x"])
def test_seeds_that_no_generator_takes(seed: str, jobs: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check", f"--seed={seed}"])
    assert f"--seed: expected an integer from 0 to 2**62 - 1, found '{seed}'" in capsys.readouterr().err and jobs == []


def test_the_process_that_checks_does_not_come_up(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    def check(job: Job, record: Record, progress: object) -> bool:
        raise WorkerFailed("the checking process did not start: crashed: exit code 1")

    monkeypatch.setattr("sglang_fl.cli.check.check", check)
    assert "sglang-fl: the checking process did not start" in cli("check", code=1).err


def test_what_is_not_available_is_not_checked(backend: Callable[..., str], tmp_path: Path, cli: Cli) -> None:
    """With a real worker."""
    module = backend("rms_norm._is_available = lambda: False")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = cli("check", "--vendor", "testchip", code=1, SGLANG_FL_PLUGIN_MODULES=module, PYTHONPATH=path).out
    assert "its availability check returned False" in told
    assert "nothing was checked: its availability check returned False" in told


def test_interrupting_it_keeps_what_was_found(backend: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cases return, and the last never does."""
    called = tmp_path / "called"
    reference = "sglang_fl.dispatch.backends.reference.impl.normalization"
    name = backend(
        "def rms_norm(obj, x, residual=None):\n"
        f"    from {reference} import rms_norm as right\n"
        "    if x.dim() == 3:\n"
        f"        open({str(called)!r}, 'w').close()\n"
        "        import time; time.sleep(1000)\n"
        "    return right(obj, x, residual)\n"
    )
    process = _checking(name, tmp_path, "--quick", "--json")
    _wait_for(called, process)
    process.send_signal(signal.SIGTERM)
    found, told = process.communicate(timeout=30)
    assert process.returncode == 130 and "sglang-fl: interrupted" in told and "Traceback" not in told
    report = json.loads(found)
    assert report["cases"] and report["not_reached"] > 10 and not report["ok"]
    assert report["verdict"] == "INCOMPLETE"
    assert {case["status"] for case in report["cases"]} == {"ok"}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_is_left(sent: signal.Signals, backend: Callable[..., str], tmp_path: Path) -> None:
    called = tmp_path / "called"
    name = backend(f"def rms_norm(obj, x, residual=None):\n    open({str(called)!r}, 'w').close()\n    import time; time.sleep(1000)")
    process = _checking(name, tmp_path, "--jobs", "1")
    _wait_for(called, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.send_signal(sent)
    _, told = process.communicate(timeout=30)
    if sent is signal.SIGINT:
        assert process.returncode == 130 and "sglang-fl: interrupted" in told and "Traceback" not in told
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []


def test_a_run_in_slices(jobs: list[Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli) -> None:
    """The budget ends the first; the second has the options of the first, the third only shows what was found."""
    file = tmp_path / "run.jsonl"
    command = ("check", "--resume", str(file), "--budget", "9m", "--json")
    add = Record.add
    monkeypatch.setattr(Record, "add", lambda *arguments: None)
    found = json.loads(cli(*command, "--op", "rms_norm", "--impl", "reference.torch", "--quick", "--seed", "4", code=3).out)
    assert (found["verdict"], found["ok"], found["not_reached"], found["cases"]) == ("INCOMPLETE", False, 1, [])
    monkeypatch.setattr(Record, "add", add)
    cli(*command)
    assert jobs[0] == jobs[1] and jobs[1].budget == 540.0
    assert f"nothing was run: {file} has every result" in cli(*command).err
    assert len(jobs) == 2
    told = "--resume: the file is of another run (seed was 4 then, and is 5 now); name another file"
    assert told in cli(*command, "--seed", "5", code=2).err


def test_a_budget_that_is_too_small(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr("sglang_fl.cli.check.check", lambda job, record, progress: True)
    assert "the budget was used up before the first case" in cli("check", "--budget", "1s", code=3).err


def test_the_result_is_kept_where_doctor_and_ops_look(jobs: list[Job], tmp_path: Path, cli: Cli) -> None:
    command = ("check", "--op", "rms_norm", "--impl", "reference.torch")
    told = cli(*command, "--resume", str(tmp_path / "run.jsonl"), "--out").err
    (kept,) = (tmp_path / "data/sglang-fl/checks").iterdir()
    assert kept.read_bytes() == (tmp_path / "run.jsonl").read_bytes()
    assert f"result saved in {kept}" in told
    assert re.search("rms_norm +reference.torch +PASSED on 2026-01-02 +\n", cli("ops").out)
    captured = cli(*command, "--resume", str(tmp_path / "run.jsonl"), "--out", "/dev/full", code=1)
    assert "PASSED" in captured.out and "--out: [Errno 28] No space left on device" in captured.err
    assert f"--out: {kept} exists; --resume {kept} continues it" in cli(*command, "--out", str(kept), code=2).err


def _checking(module: str, directory: Path, *words: str) -> subprocess.Popen[str]:
    """``sglang-fl check`` of a module's implementations, under way."""
    path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "sglang_fl", "check", "--vendor", "testchip", *words],
        env={**os.environ, "PYTHONPATH": path, "SGLANG_FL_PLUGIN_MODULES": module},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(called: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not called.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
