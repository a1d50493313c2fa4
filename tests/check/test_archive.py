# SPDX-License-Identifier: Apache-2.0
"""The archive of a failing case: unpacked and run without SGLang, it shows what the check saw."""

import runpy
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_fl.check.archive import write_archive
from sglang_fl.check.cases import OPERATORS_CHECKED, cases_of
from sglang_fl.check.constants import INPUTS, UNUSUAL
from sglang_fl.dispatch.manager import OpManager
from sglang_fl.dispatch.types import LazyFunction, OpImpl

CPU = torch.device("cpu")
WRONG = """
from sglang_fl.dispatch.backends.reference.impl.normalization import rms_norm as right

def rms_norm(obj, x, residual=None):
    return right(obj, x, residual) * 1.02
"""


@pytest.fixture(scope="module")
def manager() -> OpManager:
    manager = OpManager()
    manager.ensure_initialized()
    return manager


def reference_of(manager: OpManager, op: str) -> OpImpl:
    impl = manager.registry.get_implementation(op, "reference.torch")
    assert impl is not None
    return impl


def repeated(archive: str, directory: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(directory)
    runpy.run_path(str(directory / "repeat.py"))


@pytest.mark.parametrize("op", OPERATORS_CHECKED)
def test_it_repeats_a_case(
    op: str, manager: OpManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Strided inputs too. An operator whose results are judged together has no numbers to compare with."""
    monkeypatch.setitem(sys.modules, "sglang", None)
    impl = reference_of(manager, op)
    dtypes = frozenset(OPERATORS_CHECKED[op].dtypes[:1])
    cases = [case for case in cases_of(op, dtypes, CPU, quick=True) if case.check in (UNUSUAL, INPUTS)]
    for case in cases[:: max(1, len(cases) // 2)]:
        repeated(write_archive(tmp_path, impl, case, 3, CPU), tmp_path / "unpacked")
        said = capsys.readouterr().out
        single = [one for one in OPERATORS_CHECKED[op].exact(case.draw(3, CPU)) if hasattr(one, "bound")]
        assert said.count(": 0 of ") == len(single) == len(said.splitlines()), case.name


def test_it_shows_what_is_wrong(
    manager: OpManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_wrong_kernel.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)
    case = next(cases_of("rms_norm", None, CPU, quick=True))
    impl = replace(reference_of(manager, "rms_norm"), fn=LazyFunction("a_wrong_kernel", "rms_norm"))
    repeated(write_archive(tmp_path, impl, case, 3, CPU), tmp_path / "unpacked")
    said = capsys.readouterr().out
    assert said.startswith("result: ") and ": 0 of " not in said and " are out of bounds; the largest error is " in said


def test_large_inputs_are_not_written(manager: OpManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_fl.check.archive._LARGEST", 1 << 10)
    case = next(cases_of("rms_norm", None, CPU, quick=True))
    assert write_archive(tmp_path, reference_of(manager, "rms_norm"), case, 3, CPU).startswith("not written: its inputs are ")
    assert list(tmp_path.iterdir()) == []
