# SPDX-License-Identifier: Apache-2.0
"""A server on an SGLang that lacks something that sglang-fl relies on."""

import os
from pathlib import Path

import pytest

from sglang_fl.cli.demo_model import RECITAL

from .conftest import serving

pytestmark = pytest.mark.e2e

#: Imported by the server's processes, as a module with operators would be.
WITHOUT = """
from sglang.srt.layers.activation import QuickGELU
del QuickGELU.forward_native

def register_builtins(registry):
    pass
"""


def test_it_serves_natively_and_says_what_differs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "another_sglang.py").write_text(WITHOUT)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environ = {"SGLANG_FL_PLUGIN_MODULES": "another_sglang", "PYTHONPATH": path, "SGLANG_FL_PREFER": "reference"}
    with serving(model, tmp_path, environ=environ) as running:
        assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL
    log = (tmp_path / "server.log").read_text()
    assert log.count("sglang-fl leaves everything to SGLang") == 1
    assert log.count("  - sglang.srt.layers.activation:QuickGELU.forward_native ") == 1
    assert "sglang-fl binds nothing" in log and "kernels of SGLang's that run on" not in log
    assert not running.dispatch_log.exists() or not running.dispatched(), "nothing was bound, and so nothing is logged"
