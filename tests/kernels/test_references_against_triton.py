# SPDX-License-Identifier: Apache-2.0
"""SGLang's own kernels, in Triton's interpreter, pass the cases of ``sglang-fl check`` on new random arguments."""

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_sglangs_kernels_do_what_check_says() -> None:
    command = [sys.executable, str(Path(__file__).parent / "against_triton.py"), str(secrets.randbits(31))]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 20, "17 kernels and three operators"
    assert {target: one["failed"] for target, one in found.items() if one["failed"]} == {}, command
    assert all(one["ran"] >= 3 for one in found.values())
