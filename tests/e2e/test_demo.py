# SPDX-License-Identifier: Apache-2.0
"""The command that ``make demo`` runs, as a user runs it."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sglang_fl.cli.demo_model import RECITAL

pytestmark = pytest.mark.e2e


def start_demo(*arguments: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "COLUMNS": "120"}
    command = [sys.executable, "-m", "sglang_fl", "demo", *arguments]
    # A shell's background job ignores Ctrl-C, and what it starts inherits that.
    interruptible = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ, preexec_fn=interruptible)


def children(demo: subprocess.Popen[str]) -> list[psutil.Process]:
    """What the demo has started: the server, and what that started."""
    return psutil.Process(demo.pid).children(recursive=True)


def wait_for(demo: subprocess.Popen[str], word: str) -> list[psutil.Process]:
    """The demo's children, once one with a word in its command line is among them."""
    until = time.monotonic() + 400
    while demo.poll() is None and time.monotonic() < until:
        found = children(demo)
        for child in found:
            with contextlib.suppress(psutil.NoSuchProcess):  # nor has a zombie a command line
                if word in " ".join(child.cmdline()):
                    return found
        time.sleep(0.5)
    demo.kill()
    raise AssertionError(f"no child of the demo has {word!r} in its command line: {demo.communicate()[0]}")


def test_the_demo_recites_and_cleans_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    demo = start_demo("--prefer", "reference")
    printed, _ = demo.communicate(timeout=600)
    assert demo.returncode == 0, printed
    assert RECITAL in printed
    assert "PASSED: exactly the expected text" in printed and "tokens/s" in printed
    for name in ("RMSNorm", "SiluAndMul", "RotaryEmbedding"):
        assert any(name in line and "reference(reference.torch)" in line for line in printed.splitlines())
    assert not list(tmp_path.glob("sglang-fl-demo-*")), "its temporary files are gone too"
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- transcript of: sglang-fl demo -->\n```\n")[2].partition("\n```")[0]
    assert all(without_numbers(part) in without_numbers(printed) for part in shown.split("…")), "the README shows something else"


def without_numbers(text: str) -> str:
    return " ".join(re.sub(r"\d+", "N", text).split())


@pytest.mark.parametrize(("signum", "stage"), [(signal.SIGINT, "sglang::scheduler"), (signal.SIGTERM, "sglang.launch_server")])
def test_an_interrupted_demo_leaves_nothing(model: Path, signum: signal.Signals, stage: str) -> None:
    demo = start_demo()
    started = wait_for(demo, stage)
    demo.send_signal(signum)
    printed, _ = demo.communicate(timeout=180)
    assert demo.returncode == 130, printed
    assert "interrupted" in printed
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def test_a_port_in_use_is_said(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        demo = start_demo("--port", str(taken.getsockname()[1]))
        printed, _ = demo.communicate(timeout=120)
    assert demo.returncode == 2
    assert "is in use" in printed


def test_a_cache_that_cannot_be_used_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    demo = start_demo()
    printed, _ = demo.communicate(timeout=120)
    assert demo.returncode == 1
    assert "XDG_CACHE_HOME" in printed and "Traceback" not in printed
