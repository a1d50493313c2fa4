# SPDX-License-Identifier: Apache-2.0
"""The page in a browser, at the widths of a phone and of a desk."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sglang_fl.check.constants import CRASHED, FAILED, OK, REFUSED, SERVING, SPEED, UNUSUAL
from sglang_fl.check.page import as_html
from sglang_fl.check.results import CaseResult, Report, Target

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: What reaches beyond the page, and text that is wider than its box, into the title, which ``--dump-dom`` prints.
_MEASURE = """<script>addEventListener("load", () => {
  const width = document.documentElement.clientWidth, cut = [];
  for (const one of document.body.querySelectorAll("*"))
    if (one.getBoundingClientRect().right > width + 1 || (one.clientWidth && one.scrollWidth > one.clientWidth + 1))
      cut.push(one.tagName + ": " + one.textContent.trim().slice(0, 40));
  document.title = width + " px; cut off: " + (cut.join("; ") || "nothing");
})</script>"""


def made(op: str, check: str, name: str, status: str, message: str = "", **more: Any) -> CaseResult:
    given = {"op": op, "impl": "vendor.x", "check": check, "name": name, "dtype": "bfloat16", "status": status, "message": message}
    return CaseResult(**{**given, **more})


def numbers(heads: int) -> dict[str, float]:
    errors = {"error_ulp": 0.1 * heads, "bound_ulp": 0.6, "reference_ulp": 0.3}
    return {**errors, "time_us": 12.0, "reference_us": 13.5, "seconds": 0.1, "compiling_s": 2.0}


def _report() -> Report:
    """Every part of a page, with words as long as they come."""
    long = "fused_recurrent_gated_delta_rule_packed_decode"
    cases = [
        made(op, check, f"tokens=65537 heads={heads} residual", OK, impl=impl, dtype=dtype, **numbers(heads))
        for op in ("rms_norm", long)
        for impl in ("reference.torch", "vendor.a_vendor_with_a_long_name")
        for check in (SERVING, UNUSUAL, SPEED)
        for dtype in ("bfloat16", "float32")
        for heads in (1, 4)
    ]
    cases += [
        made("rms_norm", SERVING, "a" * 90, FAILED, "b" * 300, error_ulp=9.0, bound_ulp=0.5, archive="/somewhere/" + "c" * 200),
        made("rms_norm", UNUSUAL, "rows", CRASHED, "crashed: signal 11 (SIGSEGV)", output="d" * 500),
        made(long, UNUSUAL, "rows", REFUSED, "NotImplementedError: " + "e" * 200),
    ]
    targets = [Target(op, impl, 12) for op in ("rms_norm", long) for impl in ("reference.torch", "vendor.a_vendor_with_a_long_name")]
    targets += [
        Target("rms_norm", "vendor.x", 2),
        Target(long, "vendor.x", 5),
        Target(long, "vendor.y", 0, "its package is not there " * 9),
    ]
    machine = {"device": "NVIDIA H100 80GB HBM3 (cuda)", "vendor": "nvidia (/proc/driver/nvidia)"}
    return Report(machine, {"torch": "2.14.1+cu130"}, "2026-01-02T03:04:05+00:00", 5, True, [], targets, cases, 61.0)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("opened", [False, True])
def test_nothing_is_cut_off(tmp_path: Path, width: int, opened: bool) -> None:
    """In a frame, as a window is not made narrower than 500 pixels."""
    page = as_html(_report()).replace("</body>", f"{_MEASURE}</body>")
    file, frame = tmp_path / "page.html", tmp_path / "frame.html"
    file.write_text(page.replace("<details>", "<details open>") if opened else page)
    frame.write_text(
        f"<body style='margin:0'><iframe src='page.html' style='border:0;width:{width}px;height:6000px'></iframe><script>addEventListener("
        "'load', () => setTimeout(() => { document.title = frames[0].document.title }, 200))</script>"
    )
    picture = tmp_path / "page.png"
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500)},6000", "--virtual-time-budget=5000"]
    subprocess.run([*command, f"--screenshot={picture}", frame.as_uri()], check=True, capture_output=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    shown = subprocess.run([*command, "--dump-dom", frame.as_uri()], check=True, capture_output=True, timeout=120, text=True).stdout
    found = re.search(r"<title>(.*?)</title>", shown)
    assert found and found[1] == f"{width} px; cut off: nothing"
