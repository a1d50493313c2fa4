# SPDX-License-Identifier: Apache-2.0
"""What ``ops`` and ``doctor`` say of results that ``check --out`` has kept."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from sglang_fl.check.certificates import certificates, directory
from sglang_fl.check.constants import FAILED, OK, SERVING
from sglang_fl.check.record import Record
from sglang_fl.check.results import CaseResult
from sglang_fl.dispatch import BackendImplKind, OpImpl
from sglang_fl.dispatch.types import LazyFunction

IMPL = OpImpl("rms_norm", "vendor.x", BackendImplKind.VENDOR, LazyFunction("chip_of_a_test.norm", "rms_norm"), vendor="x")
HEADER = {
    "machine": {"device": "X100 (cuda)", "vendor": "nvidia (a test)"},
    "versions": {"sglang-fl": version("sglang-fl"), "torch": version("torch")},
    "date": "2026-01-02T03:04:05+00:00",
    "seed": 1,
    "quick": False,
    "only": [],
    "targets": [{"op": "rms_norm", "impl": "vendor.x", "cases": 2}],
}
CASE = CaseResult(OK, op="rms_norm", impl="vendor.x", check=SERVING, name="1", dtype="bfloat16")


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes a result; its kernel is older."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "chip_of_a_test").mkdir()
    for name in ("__init__.py", "norm.py"):
        (tmp_path / "chip_of_a_test" / name).write_text("")
        os.utime(tmp_path / "chip_of_a_test" / name, (0, 0))
    monkeypatch.syspath_prepend(tmp_path)
    directory().mkdir(parents=True)

    def write(*cases: CaseResult, **header: object) -> None:
        path = directory() / f"{len(list(directory().iterdir()))}.jsonl"
        record = Record(path)
        record.begin({**HEADER, **header})
        for case in cases:
            record.add(case, 1.0)
        record.close()
        os.utime(path, (time.time() + 10 * len(list(directory().iterdir())),) * 2)

    return write


def said() -> str | None:
    return certificates("nvidia", [IMPL]).get(("rms_norm", "vendor.x"))


SECOND = replace(CASE, name="2")


def test_it_passed(keep: Callable[..., None]) -> None:
    assert said() is None
    keep(CASE, SECOND)
    assert said() == "PASSED on 2026-01-02, on X100 (cuda)"
    keep(CASE, SECOND, quick=True)
    assert said() == "PASSED on 2026-01-02 with --quick, on X100 (cuda)"


@pytest.mark.parametrize(
    ("cases", "header", "words"),
    [
        ([CASE, replace(SECOND, status=FAILED)], {}, "FAILED on 2026-01-02, on X100 (cuda): failed: 1 of 2"),
        ([CASE], {}, "INCOMPLETE on 2026-01-02, on X100 (cuda): 1 of 2 cases"),
        ([CASE, SECOND], {"versions": {"torch": "1.0"}}, f"PASSED on 2026-01-02, on X100 (cuda); torch 1.0, now {version('torch')}"),
        ([CASE, SECOND], {"only": ["tokens=1"]}, None),
        ([CASE, SECOND], {"machine": {"device": "Y", "vendor": "amd (a test)"}}, None),
    ],
)
def test_what_else_there_may_be(keep: Callable[..., None], cases: list[CaseResult], header: dict[str, object], words: str | None) -> None:
    """Single cases, and those of another chip, certify nothing here."""
    keep(*cases, **header)
    assert said() == words


@pytest.mark.parametrize(("status", "words"), [(OK, "PASSED on 2026-01-02, on X100 (cuda)"), (FAILED, "failed: 1 of 2")])
def test_older_than_its_kernel(keep: Callable[..., None], tmp_path: Path, status: str, words: str) -> None:
    keep(CASE, replace(SECOND, status=status))
    os.utime(tmp_path / "chip_of_a_test/norm.py")
    assert f"{words}; older than its kernel's source, of 20" in str(said())


def test_a_file_that_is_no_result_costs_nothing(keep: Callable[..., None]) -> None:
    keep(CASE, SECOND)
    (directory() / "other.jsonl").write_text("{}\n")
    (directory() / "cut.jsonl").write_text('{"for')
    assert said() == "PASSED on 2026-01-02, on X100 (cuda)"
