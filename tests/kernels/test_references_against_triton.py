# SPDX-License-Identifier: Apache-2.0
"""The references against SGLang's own kernels in Triton's interpreter, on arguments that are drawn anew."""

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_fl.kernels.reference import REFERENCES

#: Both compute in fp32, in another order.
AS_NEAR_AS = 2e-6


@pytest.mark.slow
def test_references_do_what_sglangs_kernels_do() -> None:
    command = [sys.executable, str(Path(__file__).parent / "against_triton.py"), str(secrets.randbits(31))]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == REFERENCES.keys()
    assert {target: worst for target, worst in found.items() if any(value > AS_NEAR_AS for value in worst)} == {}, command
    assert sum(map(bool, found.values())) >= len(REFERENCES) - 4
