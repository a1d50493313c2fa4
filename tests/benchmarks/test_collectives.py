# SPDX-License-Identifier: Apache-2.0
import argparse
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import collectives
import psutil
import pytest
from flagcx_stand_in import build
from rich.console import Console
from serving_lib import variants


@pytest.mark.parametrize(("text", "size"), [("512", 512), ("8K", 8192), ("1m", 1 << 20), ("2G", 2 << 30)])
def test_sizes(text: str, size: int) -> None:
    assert collectives.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "1.5M", "-1", "0", "1T"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        collectives.parse_size(text)


def test_the_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert [collectives.bus_factor(op, 4) for op in collectives.OPERATIONS] == [1.5, 0.75, 0.75, 0.75, 1, 1]


SCRIPT = (sys.executable, "-u", collectives.__file__)


def started(tmp_path: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """A run with the stand-in for FlagCX."""
    environ = {"PATH": "/bin", "HOME": str(tmp_path), "FLAGCX_PATH": str(build(tmp_path).parents[2])}
    command = [*SCRIPT, "--device", "cpu", "--sizes", "1K", *options, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, start_new_session=True)


def test_a_run_on_the_stand_in(tmp_path: Path) -> None:
    out = tmp_path / "collectives.json"
    with started(tmp_path, out, "12", "--rounds", "2") as process:
        printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    found = json.loads(out.read_text())
    assert found["ranks"] == 2 and found["flagcx"].startswith("of unknown release") and str(tmp_path) not in out.read_text()
    cells = {(row["op"], row["bytes"], row["candidate"]) for row in found["rows"]}
    names = ("torch", "flagcx", "flagcx-torch")
    assert cells == {(op, size, name) for op in collectives.OPERATIONS for size in (1024, 12) for name in names}
    assert all(row["us"] > 0 and row["speed"][0] > 0 for row in found["rows"])
    assert all(row["speed"] == [1, 1, 1] for row in found["rows"] if row["candidate"] == "torch")
    shown = subprocess.run([*SCRIPT, "--show", str(out)], check=True, capture_output=True, text=True, timeout=60).stdout
    assert "send_recv" in shown and "eager, up to 1 MiB" in shown


@contextmanager
def running(tmp_path: Path, out: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A run that would last, with its first row measured; and the processes that it started."""
    with started(tmp_path, out, "--rounds", "40") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "of 1024 bytes" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        yield process, children
        process.kill()
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_what_an_interrupted_run_has_measured_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "collectives.json"
    with running(tmp_path, out) as (process, _):
        os.killpg(process.pid, signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed
    assert "interrupted; this is what there is" in printed and "Traceback" not in printed
    found = json.loads(out.read_text())
    assert found["interrupted"] is True and found["rows"][0]["op"] == "all_reduce" and len(found["rows"][0]["rounds_us"]) == 40


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "collectives.json"
    with running(tmp_path, out) as (process, children):
        next(child for child in children if "multiprocessing.spawn" in " ".join(child.cmdline())).kill()
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "terminated with signal SIGKILL" in printed
    assert json.loads(out.read_text())["rows"]


def test_ranks_end_with_the_first_process(tmp_path: Path) -> None:
    with running(tmp_path, tmp_path / "collectives.json") as (process, _):
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rounds", "0"], "'0' is no number above 0"),
        (["--ranks", "-1"], "'-1' is no number above 0"),
        (["--ranks", "1"], "a collective needs two ranks"),
        (["--out", "/nowhere/at/all.json"], "'/nowhere/at/all.json' cannot be written"),
        ([], "/nowhere"),
    ],
)
def test_wrong_use(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGCX_PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["collectives.py", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit, match="2"):
        collectives.main()
    assert told in capsys.readouterr().err


def test_the_baseline_stays_where_a_candidate_failed() -> None:
    def row(candidate: str, speed: float | None, size: int = 1024) -> dict[str, object]:
        timed = {"us": 1.0, "bus_gb_s": 1.0, "speed": [speed] * 3} if speed is not None else {"error": "it cannot be captured"}
        return {"op": "all_reduce", "bytes": size, "mode": "graph", "candidate": candidate, **timed}

    rows = [row("pynccl", 1.0), row("flagcx", None), row("pynccl", 1.0, 2048), row("flagcx", 0.5, 2048)]
    console = Console(width=200, record=True, file=io.StringIO())
    collectives.show(rows, console)
    told = console.export_text()
    assert "speed against pynccl" in told and "it cannot be captured" in told and "0.500" in told and "flagcx" in told


def test_no_result_file_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        monkeypatch.setattr(sys, "argv", ["collectives.py", "--show", str(tmp_path / name)])
        with pytest.raises(SystemExit, match="2"):
            collectives.main()
        assert name in capsys.readouterr().err


class TestVariantsOfServing:
    def test_flagcx_is_where_the_shell_says(self) -> None:
        flagcx, default = variants.choose(["flagcx", "default"], [], plain_cpu=False)
        shell = {"PATH": "/bin", "FLAGCX_PATH": "/opt/flagcx"}
        assert flagcx.environ(shell, Path("log"))["FLAGCX_PATH"] == "/opt/flagcx"
        assert flagcx.environ(shell, Path("log"))["SGLANG_FL_DIST_BACKEND"] == "flagcx"
        assert "FLAGCX_PATH" not in default.environ(shell, Path("log"))
        assert "FLAGCX_PATH" not in flagcx.settings, "a machine's path is no part of the results"

    def test_without_sglangs_own_all_reduce(self) -> None:
        both = variants.choose(["native-no-custom-ar", "flagcx-no-custom-ar", "flagcx"], [], plain_cpu=False)
        assert [dict(variant.arguments) for variant in both] == [{"disable_custom_all_reduce": True}] * 2 + [{}]
        assert both[0].native
