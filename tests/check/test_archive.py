# SPDX-License-Identifier: Apache-2.0
"""The archive of a failing case: unpacked and run without SGLang, it shows what the check saw."""

import importlib
import runpy
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_fl.check.archive import write_archive
from sglang_fl.check.cases import OPERATORS_CHECKED, Case, cases_of
from sglang_fl.check.constants import INPUTS, UNUSUAL
from sglang_fl.dispatch.manager import OpManager, get_default_manager, reset_default_manager
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


def repeated(archive: str, directory: Path) -> int:
    """The script's exit code."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(directory)
    sys.modules.pop("compare", None)
    sys.path.insert(0, str(directory))
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(directory / "repeat.py"))
    finally:
        sys.path.remove(str(directory))
    return int(str(ended.value))


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
        assert repeated(write_archive(tmp_path, impl, case, 3, CPU), tmp_path / "unpacked") == 0, case.name
        *said, last = capsys.readouterr().out.splitlines()
        single = [one for one in OPERATORS_CHECKED[op].exact(case.draw(3, CPU)) if hasattr(one, "bound")]
        assert sum(": 0 of " in line for line in said) == len(single) == len(said), case.name
        assert last.startswith("Right in this one call.")


def test_it_shows_what_is_wrong(
    manager: OpManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_wrong_kernel.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)
    case = next(cases_of("rms_norm", None, CPU, quick=True))
    impl = replace(reference_of(manager, "rms_norm"), fn=LazyFunction("a_wrong_kernel", "rms_norm"))
    assert repeated(write_archive(tmp_path, impl, case, 3, CPU), tmp_path / "unpacked") == 1
    said = capsys.readouterr().out
    assert said.startswith("result: ") and ": 0 of " not in said and " are out of bounds; the largest error is " in said


#: Beside functions of a module: what packages register too, and functions that break the contract without a wrong number.
FORMS = """
import functools
import torch
from sglang_fl.dispatch import BackendImplKind, OpImpl
from sglang_fl.dispatch.backends.reference.impl.normalization import rms_norm as right

def plain(obj, x, residual=None):
    return right(obj, x, residual) * 1.02

def other_order(obj, residual=None, x=None):
    return plain(obj, x, residual)

class Kernels:
    def __call__(self, obj, x, residual=None):
        return plain(obj, x, residual)

    def rms_norm(self, obj, x, residual=None):
        return plain(obj, x, residual)

def _made():
    def closure(obj, x, residual=None):
        return plain(obj, x, residual)
    return closure

partial, callable_object, method, closure = functools.partial(plain), Kernels(), Kernels().rms_norm, _made()
unnamed = [functools.partial(plain), Kernels(), Kernels().rms_norm, _made(), lambda obj, residual=None, x=None: plain(obj, x)]

def writes_x(obj, x, residual=None):
    found = right(obj, x, residual)
    x[..., 0] += 1
    return found

def float64(obj, x, residual=None):
    return right(obj, x, residual).double()

def a_row_too_few(obj, x, residual=None):
    return right(obj, x, residual)[1:]

def register_builtins(registry):
    for number, function in enumerate(unnamed):
        registry.register_impl(OpImpl("rms_norm", f"vendor.unnamed{number}", BackendImplKind.VENDOR, function, vendor=f"unnamed{number}"))
"""


@pytest.fixture
def forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of kernels, registered in the process."""
    (tmp_path / "kernels_of_all_forms.py").write_text(FORMS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SGLANG_FL_PLUGIN_MODULES", "kernels_of_all_forms")
    reset_default_manager()
    yield importlib.import_module("kernels_of_all_forms")
    reset_default_manager()
    del sys.modules["kernels_of_all_forms"]


def plain_case() -> Case:
    return next(case for case in cases_of("rms_norm", None, CPU, quick=True) if case.draw(3, CPU).inputs.get("residual") is None)


@pytest.mark.parametrize("name", ["plain", "other_order", "partial", "callable_object", "method", "closure"])
def test_a_function_with_a_name(forms: Any, name: str, manager: OpManager, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is imported by its name, and gets each argument where it takes it."""
    impl = replace(reference_of(manager, "rms_norm"), fn=getattr(forms, name))
    assert repeated(write_archive(tmp_path, impl, plain_case(), 3, CPU), tmp_path / "unpacked") == 1
    assert " are out of bounds; the largest error is " in capsys.readouterr().out
    assert f"from kernels_of_all_forms import {name} as function" in (tmp_path / "unpacked/repeat.py").read_text()


def test_a_function_without_a_name_is_taken_from_the_registry(forms: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Partials, objects, methods, closures and adapters to lambdas."""
    get_default_manager().ensure_initialized()
    for number in range(len(forms.unnamed)):
        impl = get_default_manager().registry.get_implementation("rms_norm", f"vendor.unnamed{number}")
        assert impl is not None
        assert repeated(write_archive(tmp_path, impl, plain_case(), 3, CPU), tmp_path / "unpacked") == 1
        assert " are out of bounds; the largest error is " in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, said",
    [
        ("writes_x", "argument 1 was written, which is read-only"),
        ("float64", "result: torch.float64 of shape ("),
        ("a_row_too_few", "result: torch.float32 of shape ("),
    ],
)
def test_a_broken_contract(
    forms: Any, name: str, said: str, manager: OpManager, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    impl = replace(reference_of(manager, "rms_norm"), fn=getattr(forms, name))
    case = replace(plain_case(), dtype="float32")
    assert repeated(write_archive(tmp_path, impl, case, 3, CPU), tmp_path / "unpacked") == 1
    assert said in capsys.readouterr().out


def test_large_inputs_are_not_written(manager: OpManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_fl.check.archive._LARGEST", 1 << 10)
    case = next(cases_of("rms_norm", None, CPU, quick=True))
    assert write_archive(tmp_path, reference_of(manager, "rms_norm"), case, 3, CPU).startswith("not written: its inputs are ")
    assert list(tmp_path.iterdir()) == []
