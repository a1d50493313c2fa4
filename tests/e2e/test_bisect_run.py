# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl bisect --run`` with a command that starts a server: the session of docs/bisect.md."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BISECT = Path(__file__).parents[1] / "bisect"


@pytest.mark.slow
@pytest.mark.e2e
def test_a_wrong_kernel_is_found_by_what_servers_answer(model: Path, tmp_path: Path) -> None:
    shutil.copy(BISECT / "judge.sh", tmp_path)
    (tmp_path / "demo-model").symlink_to(model)
    path = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(BISECT), os.environ.get("PYTHONPATH", "")]),
    }
    environ = {**os.environ, **path, "SGLANG_FL_PLUGIN_MODULES": "mychip_kernels", "SGLANG_FL_PREFER": "vendor", "OMP_NUM_THREADS": "1"}
    command = ["sglang-fl", "bisect", "--run", "sh judge.sh", "--out", "found"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    print(done.stderr + done.stdout)
    assert done.returncode == 1, done.stderr
    assert "op:rotary_embedding makes the command fail: it fails with only this on, and passes with only this off" in done.stdout
    assert "SGLANG_FL_PER_OP='rotary_embedding=sglang'" in done.stdout and "No run loaded a model" not in done.stdout
