# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl bisect MODEL``: what is refused before a model is loaded."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sglang_fl.cli import main


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/no/such/model"], "bisect: there is no model in /no/such/model"),
        (["m", "--run", "true"], "bisect: give either MODEL or --run 'CMD'"),
        ([], "bisect: give MODEL, or --run 'CMD'"),
        (["m", "--prompts", "/no/such/file"], "--prompts: /no/such/file cannot be read"),
        (["m", "--html", "/no/such/folder/page.html"], "--html: "),
        (["m", "--archive", "/proc/none"], "--archive: /proc/none cannot be created"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_without_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_text("\n \n")
    assert main(["bisect", "m", "--prompts", str(tmp_path / "prompts")]) == 2
    assert "has no prompt; write one per line" in capsys.readouterr().err


def test_help_has_both_ways_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bisect", "--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("MODEL", "--prompt TEXT", "--run CMD", "--archive DIR", "130 interrupted"))


@pytest.mark.e2e
def test_after_an_interrupt_nothing_is_left_running(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = subprocess.Popen([sys.executable, "-P", "-m", "sglang_fl", "bisect", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    process = psutil.Process(command.pid)
    end = time.monotonic() + 120
    while not (workers := process.children()) and time.monotonic() < end:
        time.sleep(0.2)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=60)
    assert command.returncode == 130 and "sglang-fl: interrupted" in said
    assert len(workers) == 1 and not psutil.pid_exists(workers[0].pid)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_model_that_sglang_cannot_load_and_arguments_that_it_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "no-such-model"}')
    assert main(["bisect", str(tmp_path)]) == 2
    assert "sglang-fl: the model's process, loading the model: " in capsys.readouterr().err
    assert main(["bisect", str(tmp_path), "--", "--no-such-argument"]) == 2
    found = capsys.readouterr().err
    assert "SGLang does not take its arguments" in found and "--no-such-argument" in found
