# SPDX-License-Identifier: Apache-2.0
import io

import pytest
from rich.console import Console

from sglang_fl.check.runner import Progress
from sglang_fl.cli import check_progress

PROGRESS = Progress(3, 20, [("vendor.x: rms_norm [/x]", "running", 4.0), ("vendor.y: topk serving", "compiling", 71.0)])


def test_in_a_terminal() -> None:
    out = io.StringIO()
    with check_progress.showing(Console(file=out, force_terminal=True, width=120)) as progress:
        progress(Progress(0, 0))
        progress(PROGRESS)
    text = out.getvalue()
    assert "0 of ? cases" in text and "3 of 20 cases" in text
    assert "71 s" in text and "compiling" in text and "vendor.x: rms_norm [/x]" in text


def test_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line now and then, with what has taken longest."""
    out = io.StringIO()
    with check_progress.showing(Console(file=out)) as progress:
        progress(PROGRESS)
        assert out.getvalue() == ""
        monkeypatch.setattr(check_progress, "_LINE_INTERVAL", 0.0)
        progress(PROGRESS)
    assert out.getvalue() == "3 of 20 cases, 0 s; compiling for 71 s: vendor.y: topk serving\n"
