# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl bisect --run``, with commands that ask the real settings what is on."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_fl.cli import main
from sglang_fl.dispatch.catalog import classes_of
from sglang_fl.dispatch.ops import OPERATORS

#: On a plain CPU: the operators that SGLang calls.
SWITCHES = sum(bool(classes_of(op)) for op in OPERATORS)
JUDGE = shlex.join([sys.executable, str(Path(__file__).parents[1] / "bisect/judge.py")])
#: Fails where op:topk is on.
TOPK = 'case "$SGLANG_FL_PER_OP" in *topk=sglang*) exit 0;; *) {};; esac'
Bisect = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def bisect(capsys: pytest.CaptureFixture[str]) -> Bisect:
    """Runs it with --json; its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = main(["bisect", "--json", *arguments])
        printed = capsys.readouterr()
        return code, {"stderr": printed.err, **(json.loads(printed.out) if printed.out else {})}

    return run


def test_a_flaggems_function(bisect: Bisect, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a user with a list of his own has on."""
    machine("nvidia")
    monkeypatch.setenv("SGLANG_FL_PLATFORM", "nvidia")
    monkeypatch.setenv("SGLANG_FL_PREFER", "flagos")
    monkeypatch.setenv("SGLANG_FL_FLAGOS_BLACKLIST", "add,mm")
    code, found = bisect("--run", f"{JUDGE} aten:softmax", "--out", "here")
    assert (code, found["exit_code"], found["verdict"], found["switches"]) == (1, 1, "found", ["aten:softmax"])
    assert found["odds"] > 99 and len(found["runs"]) <= 16
    assert found["exclusion"] == "SGLANG_FL_FLAGOS_BLACKLIST=add,mm,softmax"
    for run in found["runs"]:
        on = "aten:softmax" in run["on"]
        assert (run["failed"], run["how"]) == (on, f"exit code {int(on)}")
        assert Path("here", run["output"]).read_text() == f"aten:softmax is {'on' if on else 'off'}\n"


def test_an_operator_and_the_page_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", "--run", f"{JUDGE} op:rms_norm"]) == 1
    printed = capsys.readouterr()
    assert "op:rms_norm makes the command fail: it fails with only this on, and passes with only this off: odds" in printed.out
    assert "op_backends:\n  rms_norm: [sglang]\n" in printed.out
    assert "No run loaded a model with sglang-fl" in printed.out
    assert f"run 1: {SWITCHES} of {SWITCHES} on: failed (exit code 1" in printed.err and f"run 2: 0 of {SWITCHES} on: passed" in printed.err


@pytest.mark.parametrize(
    ("fails", "how"),
    [
        ("exit 1", "exit code 1"),
        ("kill -SEGV $$", "signal 11 (SIGSEGV)"),
        ("(kill -ABRT $(exec sh -c 'echo $PPID')); exit $?", "exit code 134, as after signal 6 (SIGABRT)"),
        ("sleep 60", "not finished within 0.5 s"),
    ],
)
def test_how_a_command_fails(bisect: Bisect, fails: str, how: str) -> None:
    code, found = bisect("--run", TOPK.format(fails), "--limit", "0.5")
    assert (code, found["switches"]) == (1, ["op:topk"])
    assert {run["how"] for run in found["runs"]} == {"exit code 0", how}


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("true", 0, f"The command does not fail with all {SWITCHES} switches on: odds"),
        ("false", 3, "It is no operator: the command also fails with all switches off: odds"),
    ],
)
def test_what_is_no_switch(bisect: Bisect, command: str, code: int, told: str) -> None:
    found = bisect("--run", command)
    assert (found[0], found[1]["switches"], found[1]["exclusion"]) == (code, [], None)
    assert found[1]["message"].startswith(told)


def test_two_that_act_together(bisect: Bisect) -> None:
    command = """case ";$SGLANG_FL_PER_OP" in *";rms_norm=sglang"*|*topk=sglang*) exit 0;; *) exit 1;; esac"""
    code, found = bisect("--run", command, "--out", "here", "--max-runs", "25")
    assert (code, found["switches"]) == (4, [])
    assert found["verdict"] == "undecided" and "--pairs" in found["message"] and "With all on, " in found["message"]
    told = "after 20 runs: two may act together. To look for pairs in these runs too: Ctrl-C, and then sglang-fl bisect --resume here"
    assert told in found["stderr"]
    before = len(found["runs"])
    code, found = bisect("--resume", "here", "--pairs", "--max-runs", "80")
    assert (code, found["switches"]) == (1, ["op:topk", "op:rms_norm"])
    assert found["exclusion"] == "op_backends:\n  topk: [sglang]", "one of them is enough"
    assert len(found["runs"]) > before


def test_what_a_models_report_suspects_is_tried_first(bisect: Bisect, in_a_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = in_a_folder / "report.json"
    report.write_text('{"suspicion": {"op:topk": 50.0, "op:rms_norm": 1.2}}')
    code, found = bisect("--run", TOPK.format("exit 1"), "--report", str(report))
    assert (code, found["switches"]) == (1, ["op:topk"])
    assert len(found["runs"]) < len(bisect("--run", TOPK.format("exit 1"), "--out", "without")[1]["runs"])
    for text in ("[]", "{}", '{"suspicion": {"op:topk": "much"}}', '{"suspicion": {"op:topk": 0}}', "none"):
        report.write_text(text)
        assert main(["bisect", "--run", "true", "--report", str(report)]) == 2
        assert f"--report: {report} is no report of sglang-fl bisect MODEL --json" in capsys.readouterr().err


def test_runs_that_cannot_be_judged(bisect: Bisect) -> None:
    """125 here and there costs a run; always, it ends the search."""
    once = "test -e asked || { touch asked; exit 125; }; "
    code, found = bisect("--run", once + TOPK.format("exit 1"))
    assert (code, found["switches"], found["runs"][0]["failed"]) == (1, ["op:topk"], None)
    code, found = bisect("--run", "exit 125", "--out", "here")
    assert code == 2 and "the last 5 runs could not be judged (exit code 125)" in found["stderr"]


def test_a_command_that_is_none(bisect: Bisect) -> None:
    code, found = bisect("--run", "no-such-command")
    assert code == 2 and "exit code 127: the shell did not find a command; its output is in " in found["stderr"]


def test_what_a_command_leaves_behind_is_ended(bisect: Bisect, in_a_folder: Path) -> None:
    """As a server that it started in the background."""
    bisect("--run", "sleep 300 & echo $! >> servers; exit 1", "--max-runs", "2")
    servers = (in_a_folder / "servers").read_text().split()
    assert len(servers) == 2 and not any(map(alive, map(int, servers)))


#: A server in a session of its own, whose parent has ended, and which ignores SIGTERM.
DAEMON = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open("servers", "a").write(f"{os.getpid()}\\n")
        time.sleep(300)
    os._exit(0)
os.wait()
until = time.monotonic() + 20
while not os.path.exists("servers") and time.monotonic() < until:
    time.sleep(0.05)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the environment of other processes from /proc")
@pytest.mark.parametrize("start", ["setsid sleep 300 & echo $! >> servers", f"{sys.executable} daemon.py"])
def test_a_server_that_leaves_the_commands_session_is_ended(
    start: str, bisect: Bisect, in_a_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would answer all later runs."""
    monkeypatch.setattr("sglang_fl.bisect.command._GRACE", 0.5)
    (in_a_folder / "daemon.py").write_text(DAEMON)
    bisect("--run", f"{start}; exit 1", "--max-runs", "1")
    (server,) = (in_a_folder / "servers").read_text().split()
    assert not alive(int(server))


def test_every_run_has_the_users_record_of_trials(bisect: Bisect, in_a_folder: Path) -> None:
    """What a crash of one run adds to it does not change what the next one has on."""
    record = in_a_folder / "trials.json"
    os.environ["SGLANG_FL_TRIAL_RECORD"] = str(record)
    try:
        record.write_text('{"of": "the user"}')
        bisect("--run", 'cat "$SGLANG_FL_TRIAL_RECORD"; echo more >> "$SGLANG_FL_TRIAL_RECORD"; exit 1', "--max-runs", "3", "--out", "here")
    finally:
        del os.environ["SGLANG_FL_TRIAL_RECORD"]
    assert [file.read_text() for file in sorted((in_a_folder / "here").glob("*.txt"))] == ['{"of": "the user"}'] * 3
    assert record.read_text() == '{"of": "the user"}'


def alive(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, 0)
        return b") Z " not in Path(f"/proc/{process}/stat").read_bytes()
    return False


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


#: Its third run does not end by itself, until there is a file "quick".
SLOW = "echo $$ >> processes; test -e quick || test $(wc -l < processes) -lt 3 || sleep 300; " + TOPK.format("exit 1")


def stop_in_third_run(number: int, folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A search that gets a signal, and the command's process."""
    command = [sys.executable, "-m", "sglang_fl", "bisect", "--run", SLOW, "--out", "here"]
    search = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
    processes = folder / "processes"
    until(lambda: processes.exists() and processes.read_text().count("\n") == 3)
    search.send_signal(number)
    search.wait(timeout=30)
    (folder / "quick").touch()
    return search, int(processes.read_text().split()[-1])


def test_ctrl_c_ends_the_command_and_loses_nothing(bisect: Bisect, in_a_folder: Path) -> None:
    search, process = stop_in_third_run(signal.SIGINT, in_a_folder)
    assert search.returncode == 130
    assert search.stderr is not None and "continue with: sglang-fl bisect --resume here/runs.jsonl" in search.stderr.read()
    until(lambda: not alive(process))  # the system ends what was killed a little later
    before = [json.loads(line) for line in Path("here/runs.jsonl").read_text().splitlines() if '"failed"' in line]
    code, found = bisect("--resume", "here/runs.jsonl")
    assert (code, found["switches"]) == (1, ["op:topk"])
    assert found["runs"][: len(before)] == before
    assert bisect("--run", SLOW, "--out", "again")[1]["runs"][-1]["run"] == found["runs"][-1]["run"], "no run was made twice"


def test_resume_after_kill(bisect: Bisect, in_a_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody ended the command: it must not run beside the next."""
    _, process = stop_in_third_run(signal.SIGKILL, in_a_folder)
    assert alive(process)
    with Path("here/runs.jsonl").open("a") as record:
        record.write('{"run": 3, "cut o')
    assert main(["bisect", "--resume", "here/runs.jsonl"]) == 2
    told = capsys.readouterr().err
    assert "seems to be still running; end it with: kill " in told and str(process) in told.split()
    os.killpg(process, signal.SIGKILL)
    until(lambda: not alive(process))
    code, found = bisect("--resume", "here/runs.jsonl")
    assert (code, found["switches"]) == (1, ["op:topk"])
    assert [run["run"] for run in found["runs"]] == list(range(1, len(found["runs"]) + 1))


def test_a_record_of_other_settings(bisect: Bisect, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bisect("--run", "true", "--out", "here", "--max-runs", "1")
    record = "here/runs.jsonl"
    monkeypatch.setenv("SGLANG_FL_PER_OP", "topk=sglang")
    for arguments, told in (
        (["--resume", record], "settings changed (op_backends.topk: None before, ['sglang'] now)"),
        (["--resume", "none.jsonl"], "there is no file 'none.jsonl'"),
        (["--run", "true", "--out", "here"], f"{record} exists; --resume {record} continues it"),
    ):
        assert main(["bisect", *arguments]) == 2
        assert told in capsys.readouterr().err
    monkeypatch.delenv("SGLANG_FL_PER_OP")
    assert main(["bisect", "--resume", record, "--run", "false"]) == 2
    assert "was started with --run 'true'" in capsys.readouterr().err
    for text, told in (
        ("no record\n", "is not a record of this version of sglang-fl bisect"),
        (Path(record).read_text() + '{"of": "another"}\n', "is not a record of this version of sglang-fl bisect"),
        ("", "is empty; start a search with --run 'CMD'"),
    ):
        Path(record).write_text(text)
        assert main(["bisect", "--resume", record]) == 2
        assert told in capsys.readouterr().err


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect"]) == 2
    assert "--run 'CMD', a command that exits with 0 if the answers are good" in capsys.readouterr().err
    assert main(["bisect", "--run", " "]) == 2
    assert "--run: the command is empty" in capsys.readouterr().err


def test_dry_run(capsys: pytest.CaptureFixture[str], in_a_folder: Path) -> None:
    assert main(["bisect", "--run", "touch ran", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{SWITCHES} switches: op:causal_conv1d_fn ")
    assert "all off: SGLANG_FL_PER_OP='" in printed and "chunk_gated_delta_rule=sglang;" in printed
    assert not list(in_a_folder.iterdir())


def test_dry_run_knows_that_there_is_no_such_command(capsys: pytest.CaptureFixture[str], in_a_folder: Path) -> None:
    assert main(["bisect", "--run", "./judge.sh 3", "--dry-run"]) == 2
    assert "--run: the shell does not find './judge.sh'" in capsys.readouterr().err
    (in_a_folder / "judge.sh").touch(0o755)
    for command in ("./judge.sh 3", "cd / && ./judge.sh", "X=1 ./judge.sh", "$HOME/judge.sh"):
        assert main(["bisect", "--run", command, "--dry-run"]) == 0


def test_a_folder_with_spaces(bisect: Bisect) -> None:
    """What is printed can be pasted."""
    code, found = bisect("--run", "false", "--out", "o s p", "--max-runs", "1")
    assert code == 4 and "Undecided after 1 run. " in found["message"]
    assert found["message"].endswith("sglang-fl bisect --resume 'o s p/runs.jsonl' --max-runs 2")


def test_runs_in_which_another_server_may_have_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """The first run loads a model, and no later one does."""
    main(["bisect", "--run", 'test -e ran || { touch ran; echo "# model" > "$SGLANG_FL_DISPATCH_LOG"; }; exit 1', "--max-runs", "3"])
    assert "Runs 2, 3: nothing loaded a model with sglang-fl: there is no dispatch log." in capsys.readouterr().out
