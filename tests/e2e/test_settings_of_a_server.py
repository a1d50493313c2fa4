# SPDX-License-Identifier: Apache-2.0
"""Settings as a user gives them, and what the real server makes of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_fl.utils.server import Server, ServerFailed, free_port

from .conftest import Prompt, off_by, serving
from .planted_mistakes import MISTAKES

pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_planted_mistakes_break_the_logprobs(
    model: Path, prompts: list[Prompt], native_logprobs: list[list[float]], tmp_path: Path
) -> None:
    """test_model_classes.py plants the same mistakes in SGLang's model runner."""
    chosen = tmp_path / "mistake"
    chosen.write_text("none")
    environ = {
        "SGLANG_FL_PLUGIN_MODULES": "planted_mistakes",
        "SGLANG_FL_PREFER": "vendor",
        "PLANTED_MISTAKE": str(chosen),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    with serving(model, tmp_path, "--disable-radix-cache", environ=environ) as running:

        def worst() -> float:
            pairs = zip(prompts, native_logprobs, strict=True)
            return max(off_by(running.logprobs(prompt), native, prompt.bounds) for prompt, native in pairs)

        assert worst() <= 1
        assert running.dispatched() == {f"{name} → vendor(vendor.planted)" for name in ("RMSNorm", "SiluAndMul", "RotaryEmbedding")}
        found = {}
        for mistake in MISTAKES:
            chosen.write_text(mistake)
            found[mistake] = worst()
        assert all(off > 1 for off in found.values()), found
        chosen.write_text("none")
        assert worst() <= 1


def test_a_broken_setting_stops_the_server(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("prefer: flagos\nop_backends:\n  rms_nrm: [reference]\n")
    environ = {"SGLANG_FL_CONFIG": str(config)}
    with Server(model, port=free_port(), log=tmp_path / "server.log", environ=environ) as server, pytest.raises(ServerFailed):
        server.wait_until_ready()
    assert server.process is not None and server.process.returncode not in (0, None)
    last = server.last_lines(1)
    assert f"{config}:3: op_backends: unknown operator 'rms_nrm'; did you mean 'rms_norm'?" in last
    assert "SettingsError" in last


def test_a_broken_setting_can_be_caught_from_an_engine(model: Path) -> None:
    code = f"""
import os
os.environ["SGLANG_FL_PREFER"] = "vendr"
import sglang
from sglang_fl.config import SettingsError
if __name__ == "__main__":
    try:
        sglang.Engine(model_path={str(model)!r})
    except SettingsError as error:
        print("caught:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "caught: sglang-fl: SGLANG_FL_PREFER: unknown value 'vendr'; did you mean 'vendor'?" in done.stdout, done.stderr[-2000:]
    assert done.returncode == 0
