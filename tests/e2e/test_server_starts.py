# SPDX-License-Identifier: Apache-2.0
"""A function that kills a rank in its first run costs one start; one that raises on a rank costs nothing. Two ranks."""

import os
from pathlib import Path

import pytest

from sglang_fl.cli.demo_model import RECITAL
from sglang_fl.utils.server import ServerFailed

from .conftest import serving

pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_the_second_start_leaves_out_what_ended_the_first(model: Path, tmp_path: Path) -> None:
    record = tmp_path / "state" / "trials.json"
    environ = {
        "SGLANG_FL_PLUGIN_MODULES": "planted_flaggems",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "SGLANG_FL_TRIAL_RECORD": str(record),
        "SGLANG_FL_FLAGOS_BLACKLIST": "mul",
    }
    with pytest.raises(ServerFailed), serving(model, tmp_path, "--tp", "2", environ=environ):
        pytest.fail("the first start must end")
    with serving(model, tmp_path, "--tp", "2", environ=environ) as running:
        assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL
        log = running.server.log.read_text()
    left_out = (
        "sglang-fl: excluded, since an earlier start crashed or hung in its first run: silu (its process ended with 'Segmentation fault'"
    )
    assert log.count(left_out) == 1
    raised = "ATen operators: rsqrt failed its trial on aten::rsqrt: TypeError: CompilationError at 12:8: no such type on rank 1"
    assert log.count(f"{raised}; using PyTorch's own kernel") == 1
    assert "FlagGems replaces 0 ATen operators" in log, "on both ranks, and at once"
    assert record.exists() and sorted(path.name for path in record.parent.iterdir()) == ["trials.json", "trials.json.lock"]
