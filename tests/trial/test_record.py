# SPDX-License-Identifier: Apache-2.0
"""What ended a start is left out by the next one: real processes that end in a first run."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from no_home import without_home

from sglang_fl.config import Settings, SettingsError, Source
from sglang_fl.trial import Guard, TrialRecord, current_guard, environment, open_guard, record_path
from sglang_fl.trial.record import forget, read_record

FIRST_RUN = Path(__file__).with_name("first_run.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "trials.json"


def start(path: Path, what: str, name: str = "mul", limit: float = 60) -> "subprocess.Popen[str]":
    command = [sys.executable, str(FIRST_RUN), str(path), str(limit), name, what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(path: Path, what: str, limit: float = 60) -> tuple[int, str]:
    process = start(path, what, limit=limit)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def left_out(path: Path) -> dict[str, str]:
    """What the next start leaves out."""
    record = TrialRecord(path, environment("a chip"))
    try:
        return record.excluded()
    finally:
        record.close()


@pytest.mark.parametrize(
    ("signum", "words"),
    [
        ("SIGSEGV", "Segmentation fault"),
        ("SIGABRT", "Aborted"),
        ("SIGBUS", "Bus error"),
        ("SIGILL", "Illegal instruction"),
        ("SIGFPE", "Floating point exception"),
    ],
)
def test_a_crash_counts_at_once(path: Path, signum: str, words: str) -> None:
    code, _ = run(path, signum)
    assert code == -getattr(signal, signum)
    (reason,) = left_out(path).values()
    assert reason.startswith(f"its process ended with '{words}' at File") and "first_run.py" in reason
    assert list(path.parent.glob("*.json.*-*")) == [], "the process's own file was removed"


def test_a_kill_counts_the_second_time(path: Path) -> None:
    run(path, "SIGKILL")
    assert left_out(path) == {}
    run(path, "SIGKILL")
    assert left_out(path)["mul"].startswith("its process was killed 2 times")


@pytest.mark.parametrize("what", ["SIGTERM", "SIGINT", "SIGHUP", "raises"])
def test_what_comes_from_outside_never_counts(path: Path, what: str) -> None:
    for _ in range(2):
        code, _ = run(path, what)
        assert code in (-getattr(signal, what, 0), 1)
    assert left_out(path) == {} and read_record(path) == {}


def test_what_calls_exit_raises_an_error_but_for_the_handler_of_a_signal(path: Path) -> None:
    record = TrialRecord(path, environment("a chip"))
    with pytest.raises(RuntimeError, match=r"^it called sys\.exit\('no licence'\)$"), Guard(record, 60).running("mul"):
        sys.exit("no licence")
    with pytest.raises(RuntimeError, match=r"^it called sys\.exit\(\)$"), Guard(record, 60).running("mul"):
        sys.exit()
    record.close()
    code, _ = run(path, "exits when it gets SIGTERM")
    assert code == 3
    assert left_out(path) == {} and read_record(path) == {}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_what_hangs_and_keeps_pythons_lock_ends_when_it_is_asked_to(path: Path, signum: signal.Signals) -> None:
    for _ in range(2):
        process = start(path, "hangs without python", limit=3600)
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        time.sleep(0.3)  # until it hangs
        process.send_signal(signum)
        process.communicate(timeout=20)
        assert process.returncode == -signum
    assert left_out(path) == {} and read_record(path) == {}


def test_the_guards_threads_take_no_signals_from_outside(path: Path) -> None:
    """A thread that has just begun would write nothing, and the process would count as killed."""
    record, threads = TrialRecord(path, environment("a chip")), Path("/proc/self/task")
    before = set(threads.iterdir())
    with Guard(record, 60).running("mul"):
        masks = [int((thread / "status").read_text().split("SigBlk:")[1].split()[0], 16) for thread in set(threads.iterdir()) - before]
    record.close()
    outside = {1 << signum - 1 for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    assert len(masks) == 2 and all(mask & bit for mask in masks for bit in outside)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("what", ["parent", "parent without python"])
def test_the_death_of_a_parent_never_counts(path: Path, what: str) -> None:
    """SGLang has its workers killed with SIGKILL then."""
    worker = f"[sys.executable, {str(FIRST_RUN)!r}, {str(path)!r}, '3600', 'mul', {what!r}]"
    ask = "import ctypes; ctypes.CDLL(None).prctl(1, 9)"
    code = f"import subprocess, sys; subprocess.run({worker}, preexec_fn=lambda: exec({ask!r}))"
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
            parent.communicate(timeout=30)  # until the worker has ended, too
        assert left_out(path) == {} and read_record(path) == {}


def test_the_limit_ends_the_process_with_a_line_that_says_so(path: Path) -> None:
    code, errors = run(path, "hangs", limit=0.3)
    assert code == 1
    assert f"sglang-fl: mul: its first run did not end within 0.3 s, so this process ends. The next start excludes it ({path})" in errors
    assert left_out(path)["mul"].startswith("its first run did not end within 0.3 s")


@pytest.mark.parametrize("what", ["hangs without python", "hangs without python after an inner run"])
def test_the_limit_holds_where_python_cannot_run(path: Path, what: str) -> None:
    code, _ = run(path, what, limit=0.2)
    assert code == 1
    assert left_out(path)["mul"].startswith("it did not end within 0:00:05.2")


def test_sglang_kills_the_other_ranks_where_one_has_ended(path: Path) -> None:
    """The rank that crashed explains why the other was killed."""
    for _ in range(2):
        other = start(path, "waits", name="add")
        assert other.stdout is not None and other.stdout.readline() == "running\n"
        run(path, "SIGSEGV")
        other.kill()
        other.communicate()
        assert set(left_out(path)) == {"mul"} and "add" not in read_record(path)[environment("a chip")]


def test_ranks_that_are_killed_together_count_once(path: Path) -> None:
    """A container is torn down while they run the same function for the first time."""
    for times in range(1, 3):
        ranks = [start(path, "waits") for _ in range(2)]
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "running\n"
        for rank in ranks:
            rank.kill()
            rank.communicate()
        assert ("mul" in left_out(path)) == (times == 2)
        assert read_record(path)[environment("a chip")]["mul"].count == times


def test_a_living_process_is_not_judged(path: Path) -> None:
    process = start(path, "waits")
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    assert left_out(path) == {} and len(list(path.parent.glob("*.json.*-*"))) == 1
    process.communicate("")
    assert process.returncode == 0 and list(path.parent.glob("*.json.*-*")) == []


def test_many_processes_share_the_file(path: Path) -> None:
    processes = [start(path, "SIGSEGV", name=f"function_{number}") for number in range(6)]
    for process in processes:
        process.communicate(timeout=60)
    assert set(left_out(path)) == {f"function_{number}" for number in range(6)}


def test_it_is_bound_to_versions_and_chip(path: Path) -> None:
    run(path, "SIGSEGV")
    assert "mul" in left_out(path)
    other = TrialRecord(path, environment("another chip"))
    assert other.excluded() == {} and "torch 2" in other.environment and "sglang-fl" in other.environment
    other.close()
    assert forget(path) and not forget(path) and left_out(path) == {}


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200000, b"1" * 10000, b'{"a": 1}', b'{"a": {"mul": {"what": 1}}}']
)
def test_a_damaged_file_stops_nothing(path: Path, text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(text)
    assert left_out(path) == {} and path.read_bytes() == text
    assert f"the record of trials {path} is damaged (" in caplog.text and "'sglang-fl doctor --forget' removes it" in caplog.text
    run(path, "SIGSEGV")
    assert "mul" in left_out(path)
    json.loads(path.read_text())
    path.write_bytes(text)
    assert forget(path) and not path.exists() and not forget(path)


GOOD = {"reason": "it hung", "date": "2026-01-01", "count": 2, "decisive": False}


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "it hung",
        {"reason": "it hung"},
        {**GOOD, "count": None},
        {**GOOD, "count": "2"},
        {**GOOD, "count": True},
        {**GOOD, "count": 0},
        {**GOOD, "decisive": 1},
        {**GOOD, "reason": None},
        {**GOOD, "date": 2026},
    ],
)
def test_a_damaged_entry_leaves_the_others_in_force(path: Path, bad: object, caplog: pytest.LogCaptureFixture) -> None:
    here = environment("a chip")
    path.parent.mkdir()
    path.write_text(json.dumps({"another": None, here: {"mul": bad, "mm": GOOD, "of_a_newer_version": {**GOOD, "rank": 1}}}))
    assert left_out(path) == dict.fromkeys(("mm", "of_a_newer_version"), "it hung 2 times, last on 2026-01-01")
    (warning,) = caplog.messages
    assert f"ignored: all of 'another'; ignored: 'mul' of {here!r}" in warning
    run(path, "SIGSEGV")
    assert set(left_out(path)) == {"mul", "mm", "of_a_newer_version"}


def test_a_warning_names_some_of_many_damaged_entries(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"here": {f"function_{number}": None for number in range(1000)}}))
    assert read_record(path) == {"here": {}} and "'function_4' of 'here'; 995 more)" in caplog.text


@pytest.mark.parametrize("name", ["trials.json", "trials[1].json", "tr?als*.json"])
def test_only_files_of_processes_are_removed(path: Path, name: str) -> None:
    path = path.with_name(name)
    run(path, "SIGSEGV")
    others = [path.with_name(f"{name}.{end}") for end in ("bak-1", "1-deadbeef.bak", "1-dead", "2026-01-01", "1-DEADBEEF")]
    for other in others:
        other.write_text("mine")
    assert "mul" in left_out(path) and set(path.parent.iterdir()) == {path, path.with_name(f"{name}.lock"), *others}


@pytest.mark.parametrize("text", [b"", b'{"environ', b"{}\nmul\n", b'{"environment": "x", "start": 1}\n'])
def test_a_torn_file_of_a_process_tells_nothing(path: Path, text: bytes) -> None:
    path.parent.mkdir()
    torn = path.with_name(f"{path.name}.1-0a0b0c0d")
    torn.write_bytes(text)
    assert left_out(path) == {} and read_record(path) == {} and not torn.exists()


def test_inner_runs_are_the_ones_that_count(path: Path) -> None:
    record = TrialRecord(path, environment("a chip"))
    guarded = Guard(record, 60)
    before = signal.getsignal(signal.SIGTERM)

    def noted() -> str:
        return os.pread(record.file, 1000, record._header).decode()

    with guarded.running("outer"):
        with guarded.running("inner"):
            assert noted() == "inner\n"
        assert noted() == "outer\n"
    assert noted() == "" and signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1
    record.close()


def test_the_limit_is_the_innermost_runs_own(path: Path) -> None:
    code, errors = run(path, "hangs in an inner run", limit=0.3)
    assert code == 1 and "sglang-fl: inner: its first run did not end within 0.3 s, so this process ends" in errors
    assert left_out(path).keys() == {"inner"}


def test_inner_runs_do_not_use_up_the_limit(path: Path) -> None:
    code, errors = run(path, "has inner runs", limit=1.5)
    assert (code, errors) == (0, "") and left_out(path) == {}


def test_a_read_only_home(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has the setting that leaves it out. (Root may write anywhere, so a file stands where the folder would be.)"""
    (tmp_path / "home").write_text("")
    monkeypatch.setattr("sglang_fl.trial.guard._guard", Guard())
    caplog.set_level("WARNING")
    at = str(tmp_path / "home" / "trials.json")
    opened = open_guard(Settings(trial_record=at, flagos_blacklist=("add",), sources={"flagos_blacklist": Source(3, "a test")}), "a chip")
    assert "New crashes cannot be recorded" in caplog.text and at in caplog.text and current_guard() is opened
    with opened.running("mul"):
        assert "first run of mul; if the process ends here, SGLANG_FL_FLAGOS_BLACKLIST=add,mul excludes it" in caplog.text
    code, errors = run(Path(at), "hangs", limit=0.3)
    assert code == 1 and "did not end within 0.3 s, so this process ends; SGLANG_FL_FLAGOS_BLACKLIST=mul excludes it" in errors


def test_a_record_that_can_only_be_read_is_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so its name leaves no room for the names of the files beside it."""
    monkeypatch.setattr("sglang_fl.trial.guard._guard", Guard())
    path = tmp_path / ("x" * 250)
    path.write_text(json.dumps({environment("a chip"): {"mul": GOOD}}))
    opened = open_guard(Settings(trial_record=str(path)), "a chip")
    assert dict(opened.excluded) == {"mul": "it hung 2 times, last on 2026-01-01"}
    (warning,) = caplog.messages
    assert "cannot be written (File name too long). What it excludes stays excluded. New crashes cannot be recorded" in warning
    with opened.running("mm"):
        pass


@pytest.mark.parametrize("at", ["~nobody-of-this-name/x", "{}", "{}/socket", "{}/a\0b"])
def test_a_wrong_path_is_left_alone(tmp_path: Path, at: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings are checked before; what is there may have changed since. A socket stands for a device."""
    at = at.format(tmp_path)
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    monkeypatch.setattr("sglang_fl.trial.guard._guard", Guard())
    settings = Settings(trial_record=at, sources={"trial_record": Source(3, "a test")})
    assert open_guard(settings, "a chip").excluded == {}
    assert "trial_record (a test): expected a file, found" in caplog.text and "New crashes cannot be recorded" in caplog.text
    with pytest.raises(SettingsError, match="expected a file, found"):
        record_path(settings)
    assert [path.name for path in tmp_path.iterdir()] == ["socket"]


def test_a_user_without_a_home(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_fl.trial.guard._guard", Guard())
    without_home(monkeypatch)
    assert open_guard(Settings(), "a chip").excluded == {}
    assert "no place for the record of trials: " in caplog.text and "or SGLANG_FL_TRIAL_RECORD" in caplog.text


@pytest.mark.parametrize(
    ("values", "name", "line"),
    [
        ({}, "mul", "SGLANG_FL_FLAGOS_BLACKLIST=mul"),
        ({"flagos_whitelist": ("mul", "mm")}, "mul", "SGLANG_FL_FLAGOS_WHITELIST=mm"),
        ({"flagos_whitelist": ("mul",)}, "mul", "USE_FLAGGEMS=0"),
        (
            {"op_backends": (("topk", ("vendor", "sglang")),)},
            "rms_norm: default.flagos",
            "SGLANG_FL_PER_OP='topk=vendor|sglang;rms_norm=sglang'",
        ),
    ],
)
def test_the_setting_that_leaves_it_out(values: dict[str, object], name: str, line: str) -> None:
    assert Settings(**values).exclusion_of(name) == line  # type: ignore[arg-type]
