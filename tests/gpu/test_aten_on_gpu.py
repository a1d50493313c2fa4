# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: Layer 1 with the real FlagGems and its real kernels."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_fl.aten import AtenOperators
from sglang_fl.config import Settings
from sglang_fl.startup.words import flaggems_functions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def test_operators_run_on_flaggems_and_on_pytorch_again(tmp_path: Path) -> None:
    x, y = torch.randn(64, 256, device="cuda"), torch.randn(64, 256, device="cuda")
    native = [x * y, x.softmax(-1), x @ y.T, (x > y).sum()]
    log = tmp_path / "operators.log"
    settings = Settings(flaggems_record=True, flaggems_log_once=False, flaggems_log_path=str(log))
    for _ in range(2):
        with AtenOperators(settings) as report:
            replaced = [x * y, x.softmax(-1), x @ y.T, (x > y).sum()]
            lines = log.read_text().splitlines()
            assert {function for _, function in report.replaced} <= (flaggems_functions() or frozenset())
        for ours, theirs in zip(replaced, native, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
        assert any(line.endswith("aten::mul.Tensor") for line in lines) and all(": aten::" in line for line in lines)
        x * y
        assert log.read_text().splitlines() == lines, "given back to PyTorch"
        log.unlink()


def test_only_what_the_whitelist_names_is_replaced(tmp_path: Path) -> None:
    log = tmp_path / "operators.log"
    with AtenOperators(Settings(flagos_whitelist=("mul",), flaggems_record=True, flaggems_log_path=str(log))):
        x = torch.randn(8, 8, device="cuda")
        (x * x).softmax(-1) + x
    assert [line.split("aten::")[1] for line in log.read_text().splitlines()] == ["mul.Tensor"]


def test_doctor_lists_what_was_replaced() -> None:
    """In a process of its own, where nothing has imported FlagGems yet."""
    command = [sys.executable, "-m", "sglang_fl", "doctor", "--deep", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SGLANG_FL_PREFER": "flagos"}).stdout
    aten = json.loads(printed[printed.index("{") :])["aten"]
    assert aten["off"] is None
    assert len(aten["replaced"]) > 400 and aten["replaced"]["add.Tensor"] == "add"
    unknown, *measured = sorted(aten["left_by_reason"], key=lambda why: why != "this PyTorch has no such operator")
    assert unknown == "this PyTorch has no such operator"
    assert all(re.match(r"flagos_(broken|slower)(: \w+)? \(profile nvidia", why) for why in measured)
