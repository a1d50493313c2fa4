# SPDX-License-Identifier: Apache-2.0
import os
import re
from pathlib import Path

from sglang_fl.dispatch.logger_manager import DispatchLog, read_dispatch_log


def test_runs_that_share_a_file_can_be_told_apart(tmp_path: Path) -> None:
    """A server that was started again appends to the file; its lines stand behind one that says so."""
    path = tmp_path / "log"
    for destination in ("sglang(Layer 2 is off)", "reference(reference.torch)"):
        log = DispatchLog(str(path))
        log.begin("LlamaForCausalLM")
        for _ in range(2):
            log.record("RMSNorm", destination)
    text = path.read_text()
    begin = rf"# \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d, process {os.getpid()}: LlamaForCausalLM"
    first, second = r"\[OOT-DISPATCH\] RMSNorm → sglang\(Layer 2 is off\)", r"\[OOT-DISPATCH\] RMSNorm → reference\(reference\.torch\)"
    assert re.fullmatch(f"{begin}\n{first}\n{begin}\n{second}\n", text)
    assert read_dispatch_log(text + text) == [("RMSNorm", "sglang(Layer 2 is off)"), ("RMSNorm", "reference(reference.torch)")]


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    DispatchLog(None).begin("LlamaForCausalLM")
    assert not list(tmp_path.iterdir())
