# SPDX-License-Identifier: Apache-2.0
"""The command that ``make demo`` runs, as a user runs it."""

import os
import signal
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
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)


def servers() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if "sglang.launch_server" in " ".join(p.info["cmdline"] or [])]


def test_the_demo_recites_and_cleans_up(model: Path) -> None:
    demo = start_demo("--prefer", "reference")
    printed, _ = demo.communicate(timeout=300)
    assert demo.returncode == 0, printed
    assert RECITAL in printed
    assert "Exactly the text" in printed and "tokens/s" in printed
    for name in ("RMSNorm", "SiluAndMul", "RotaryEmbedding"):
        assert any(name in line and "reference(reference.torch)" in line for line in printed.splitlines())
    assert not servers()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(model: Path, signum: signal.Signals) -> None:
    demo = start_demo()
    for _ in range(300):
        if servers():
            break
        time.sleep(0.1)
    assert servers()
    time.sleep(2)
    demo.send_signal(signum)
    printed, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, printed
    assert "interrupted" in printed
    assert not servers()


def test_a_port_in_use_is_said(model: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        demo = start_demo("--port", str(taken.getsockname()[1]))
        printed, _ = demo.communicate(timeout=120)
    assert demo.returncode == 2
    assert "is in use" in printed
    assert not servers()
