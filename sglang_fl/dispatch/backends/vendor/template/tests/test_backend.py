# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest
from sglang_fl.dispatch import OpManager

from sglang_fl_mychip.backend import BACKEND


@pytest.mark.parametrize("op", BACKEND.kernels)
def test_the_check_passes(op: str) -> None:
    """Against float64 and the operator's contract. Without --quick it takes minutes, and looks at every shape."""
    command = [sys.executable, "-m", "sglang_fl", "check", "--vendor", "mychip", "--op", op, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sglang_fl_finds_the_backend() -> None:
    manager = OpManager()
    manager.ensure_initialized(())
    for op in BACKEND.kernels:
        impl = manager.registry.get_implementation(op, "vendor.mychip")
        assert impl is not None and impl.vendor == "mychip"
