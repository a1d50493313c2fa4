# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl bisect MODEL``: what is refused before a model is loaded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import planted_faults
import psutil
import pytest

from sglang_fl.cli import main
from sglang_fl.cli.demo_model import RECITAL, demo_model


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/no/such/model"], "bisect: there is no model in /no/such/model"),
        (["m", "--run", "true"], "bisect: give either MODEL or --run 'CMD'"),
        ([], "bisect: give MODEL, or --run 'CMD'"),
        (["m", "--out", "folder"], "bisect: --out goes with --run"),
        (["--run", "true", "--html", "page.html"], "bisect: --html goes with MODEL"),
        (["--run", "true", "--", "--tp", "2"], "bisect: server arguments after -- go with MODEL"),
        (["m", "--prompt", " "], "--prompt: the prompt is empty"),
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


def run(fault: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: what is planted stays there."""
    environ = {**os.environ, **planted_faults.ENVIRON, "OMP_NUM_THREADS": "1", "PLANTED_FAULT": fault, "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-P", "-m", "sglang_fl", "bisect", *arguments], env=environ, capture_output=True, text=True)


@pytest.mark.e2e
def test_a_planted_fault_by_the_command_line(tmp_path: Path) -> None:
    """The whole command with SGLang's own engine: exit code, table, setting, page and archive."""
    page, archives = tmp_path / "page.html", tmp_path / "evidence"
    (tmp_path / "prompts").write_text(f"\n{RECITAL[:84]}\n\n")
    command = [str(demo_model()), "--prompts", str(tmp_path / "prompts"), "--html", str(page), "--archive", str(archives)]
    done = run("one gather", *command, "--", "--dtype", "float32")
    assert done.returncode == 1, done.stderr
    assert "FOUND: index (FlagGems, index.Tensor): the output changes with only this on, and is right with only this off." in done.stdout
    assert "flagos_blacklist: [index]" in done.stdout and "loads of the model: 1;" in done.stdout
    passes = [line for line in done.stderr.splitlines() if line.startswith("pass ")]
    assert len(passes) == 3 and passes[2] == "pass 3 of 3: each replacement compared with SGLang's own and float64"
    assert "flagos_blacklist: [index]" in page.read_text()
    assert [file.suffix for file in archives.iterdir()] == [".zip"]


def test_help_has_both_ways_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bisect", "--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("MODEL", "--prompt TEXT", "--run CMD", "--archive DIR", "130 interrupted"))


@pytest.mark.e2e
def test_after_an_interrupt_nothing_is_left_running(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    evidence = tmp_path / "evidence"
    arguments = [sys.executable, "-P", "-m", "sglang_fl", "bisect", str(tmp_path), "--archive", str(evidence)]
    command = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    process = psutil.Process(command.pid)
    end = time.monotonic() + 120
    while not (workers := process.children()) and time.monotonic() < end:
        time.sleep(0.2)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=60)
    assert command.returncode == 130 and "sglang-fl: interrupted" in said
    assert len(workers) == 1 and not psutil.pid_exists(workers[0].pid) and not evidence.exists()


@pytest.mark.e2e
@pytest.mark.slow
def test_a_model_that_sglang_cannot_load_and_arguments_that_it_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "no-such-model"}')
    assert main(["bisect", str(tmp_path)]) == 2
    assert "sglang-fl: loading the model: the model's process: " in capsys.readouterr().err
    assert main(["bisect", "nonexist"]) == 2
    assert "sglang-fl: there is no directory nonexist, so SGLang takes it for a model on the Hugging Face Hub" in capsys.readouterr().err
    assert main(["bisect", str(tmp_path), "--", "--no-such-argument"]) == 2
    found = capsys.readouterr().err
    assert "SGLang does not take its arguments" in found and "--no-such-argument" in found
    assert main(["bisect", str(tmp_path), "--", "--model", "other"]) == 2
    assert f"the model is {tmp_path}; leave out --model-path other" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.slow
def test_a_prompt_that_is_too_long_says_how_long_it_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", str(demo_model()), "--prompt", "word " * 3000, "--", "--dtype", "float32"]) == 2
    said = capsys.readouterr().err
    assert "tokens; at most 2042 fit here" in said and "The last that its process wrote" not in said


@pytest.mark.e2e
@pytest.mark.slow
def test_random_weights_without_a_tokenizer(tmp_path: Path) -> None:
    """A model's shape is enough to find an operator that is wrong."""
    shutil.copy(demo_model() / "config.json", tmp_path)
    arguments = ["--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16"]
    done = run("batch > 8 only", str(tmp_path), "--json", "--prompt", "5 6 7, 8 9 10 11 12", "--", *arguments)
    found = json.loads(done.stdout)
    assert found["message"].startswith("RMSNorm → vendor.planted: the output changes with only this on"), done.stderr
    assert found["steps"][0] == {"step": "loading the model", "after_s": 0.0} and found["steps"][-1]["after_s"] < found["seconds"]
