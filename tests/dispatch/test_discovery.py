# SPDX-License-Identifier: Apache-2.0
"""Backends of folders, of installed packages and of modules: who is found, who fails, and what is said of them."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from installed_packages import Packages

from sglang_fl.dispatch import OpManager, OpRegistry, builtin_ops, get_default_manager, reset_default_manager
from sglang_fl.dispatch.builtin_ops import ENTRY_POINT_GROUP, Discovery, discover, register_builtins

GROUP = {ENTRY_POINT_GROUP: "{module}:register"}
BACKEND = """
from sglang_fl.dispatch import BackendImplKind, OpImpl

def chip_op(obj, x):
    return x

def register(registry):
    registry.register_impl(OpImpl("chip_op", "vendor.{name}", BackendImplKind.VENDOR, chip_op, vendor="{name}"))
"""


def found_in(registry: OpRegistry, *modules: str) -> Discovery:
    return discover(registry, modules)


def test_an_installed_package_registers(packages: Packages) -> None:
    module = packages.install(BACKEND.format(name="a"), GROUP)
    registry = OpRegistry()
    found = found_in(registry)
    assert f"{module} (entry point {module})" in found.loaded and found.failed == [] and found.conflicts == []
    (impl,) = registry.get_implementations("chip_op")
    assert (impl.impl_id, impl.vendor) == ("vendor.a", "a")


def test_an_entry_point_may_be_a_module(packages: Packages) -> None:
    packages.install(BACKEND.format(name="a") + "\nregister_builtins = register\n", {ENTRY_POINT_GROUP: "{module}"})
    registry = OpRegistry()
    assert found_in(registry).failed == []
    assert registry.get_implementation("chip_op", "vendor.a") is not None


@pytest.mark.parametrize(
    ("code", "value", "reason"),
    [
        ("import no_such", "{module}:register", "ModuleNotFoundError: No module named 'no_such' ({file}:1)"),
        ("def register(registry:", "{module}:register", "SyntaxError: '(' was never closed ({file}:1)"),
        ("import sys\nsys.exit('no licence')", "{module}:register", "SystemExit: no licence ({file}:2)"),
        ("class Stop(BaseException): pass\nraise Stop", "{module}:register", "Stop ({file}:2)"),
        ("def register(registry):\n    raise OSError('no\\n  library')", "{module}:register", "OSError: no library ({file}:2)"),
        ("register = 'chip'", "{module}:register", "TypeError: 'chip' is not a function that takes the registry"),
        ("", "{module}", "TypeError: module {module} has no register_builtins(registry)"),
        ("", "{module}:register", "AttributeError: module '{module}' has no attribute 'register'"),
        ("def register(): pass", "{module}:register", "TypeError: register() takes 0 positional arguments but 1 was given"),
        ("def register(to): to.register_impl('op')", "{module}:register", "TypeError: expected an OpImpl, found 'op' ({file}:1)"),
    ],
)  # fmt: skip
def test_a_package_that_fails_is_told_with_its_last_line_and_the_rest_goes_on(
    packages: Packages, caplog: pytest.LogCaptureFixture, code: str, value: str, reason: str
) -> None:
    broken = packages.install(code, {ENTRY_POINT_GROUP: value}, name="broken")
    sound = packages.install(BACKEND.format(name="sound"), GROUP, name="sound")
    registry = OpRegistry()
    found = found_in(registry)
    (failure,) = found.failed
    assert failure.origin == f"{broken} (entry point {broken})"
    assert failure.reason == reason.format(module=broken, file=packages.directory / f"{broken}.py")
    assert f"backend {failure.origin} could not be registered: {failure.reason}" in caplog.text
    assert f"{sound} (entry point {sound})" in found.loaded
    assert [impl.impl_id for impl in registry.get_implementations("chip_op")] == ["vendor.sound"]


def test_a_name_that_is_nearly_one_of_ours(packages: Packages, caplog: pytest.LogCaptureFixture) -> None:
    module = packages.install(BACKEND.format(name="a").replace("chip_op", "rms_nrom"), GROUP)
    told = f"{module} (entry point {module}) registers an operator 'rms_nrom', which no layer of SGLang runs on; did you mean 'rms_norm'?"
    assert found_in(OpRegistry()).warnings == [told]
    assert told in caplog.text


def test_a_function_that_registers_nothing(packages: Packages, caplog: pytest.LogCaptureFixture) -> None:
    module = packages.install("def register(registry):\n    return ['my implementations']\n", GROUP)
    told = f"{module} (entry point {module}) registers nothing: its function returned without a call of registry.register_impl"
    (warning,) = found_in(OpRegistry()).warnings
    assert warning.startswith(told) and warning in caplog.text


def test_an_import_that_does_not_come_back_is_named(
    packages: Packages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sglang_fl.utils.packages._SLOW_IMPORT_SECONDS", 0.05)
    module = packages.install("import time\ntime.sleep(0.5)\n" + BACKEND.format(name="a"), GROUP)
    found_in(OpRegistry())
    assert f"importing {module} (entry point {module}) has taken" in caplog.text


def test_a_package_that_crashes_is_named_by_its_file(packages: Packages) -> None:
    module = packages.install("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n" + BACKEND.format(name="a"), GROUP)
    ran = subprocess.run(
        [sys.executable, "-m", "sglang_fl", "ops"],
        env={**os.environ, "PYTHONPATH": str(packages.directory)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == -signal.SIGSEGV
    assert f"{packages.directory / module}.py" in ran.stderr


def test_a_package_that_registers_half_and_raises_registers_nothing(packages: Packages) -> None:
    packages.install(BACKEND.format(name="half") + "    raise OSError('the second kernel is missing')\n", GROUP)
    registry = OpRegistry()
    assert found_in(registry).failed[0].reason.startswith("OSError: the second kernel is missing")
    assert registry.get_implementations("chip_op") == []


def test_an_interrupt_is_no_failure_of_a_package(packages: Packages) -> None:
    packages.install("raise KeyboardInterrupt", GROUP)
    with pytest.raises(KeyboardInterrupt):
        found_in(OpRegistry())


def test_two_that_claim_one_id_are_an_error_that_names_both(packages: Packages, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (packages.install(BACKEND.format(name="a"), GROUP) for _ in range(2))
    registry = OpRegistry()
    found = found_in(registry)
    (told,) = found.conflicts
    assert told.startswith("chip_op: both ") and first in told and second in told and "vendor.a" in told
    assert caplog.records[-1].levelno == logging.ERROR and told in caplog.text
    for ask in (lambda: register_builtins(OpRegistry()), OpManager().ensure_initialized, lambda: OpManager().resolve("rms_norm")):
        with pytest.raises(RuntimeError, match=f"both {first}.*and {second}"):
            ask()


def test_a_package_that_claims_an_id_of_ours(packages: Packages) -> None:
    code = (
        BACKEND.format(name="a")
        .replace('"chip_op", "vendor.a"', '"rms_norm", "vendor.ascend"')
        .replace("(obj, x)", "(obj, x, residual=None)")
    )
    module = packages.install(code, GROUP)
    (told,) = found_in(OpRegistry()).conflicts
    assert told.startswith(
        f"rms_norm: both sglang_fl.dispatch.backends.vendor.ascend and {module} (entry point {module}) register vendor.ascend"
    )


def test_one_function_under_several_names_registers_once(packages: Packages) -> None:
    module = packages.install(BACKEND.format(name="a") + "\nregister_builtins = register\n", GROUP)
    registry = OpRegistry()
    found = found_in(registry, module, module)
    assert found.failed == [] and found.conflicts == []
    assert [impl.impl_id for impl in registry.get_implementations("chip_op")] == ["vendor.a"]


def test_a_module_is_named_in_its_failure() -> None:
    (failure,) = found_in(OpRegistry(), "no.such.module").failed
    assert failure.module == "no.such.module"
    assert failure.reason.startswith("ModuleNotFoundError: No module named 'no'")


def test_every_vendor_folder_is_found_and_the_template_is_not() -> None:
    found = [
        origin.rpartition(".")[2] for origin in found_in(OpRegistry()).loaded if origin.startswith("sglang_fl.dispatch.backends.vendor.")
    ]
    assert {"ascend", "cuda"} <= set(found) and "template" not in found


def test_a_vendor_folder_is_found_without_an_init_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("mychip", "template"):
        folder = tmp_path / "backends" / "vendor" / name
        folder.mkdir(parents=True)
        (folder / "register_ops.py").touch()
    monkeypatch.setattr(builtin_ops, "__file__", str(tmp_path / "builtin_ops.py"))
    assert list(builtin_ops._folders(f"{builtin_ops._BACKENDS}.vendor")) == ["sglang_fl.dispatch.backends.vendor.mychip.register_ops"]


def test_a_package_that_asks_for_operators_while_it_is_imported(packages: Packages) -> None:
    asking = "from sglang_fl.dispatch import get_default_manager\nget_default_manager().resolve('rms_norm')\n"
    packages.install(asking + BACKEND.format(name="asking"), GROUP)
    reset_default_manager()
    manager = get_default_manager()
    manager.ensure_initialized(())
    assert manager.discovery is not None
    (failure,) = manager.discovery.failed
    assert failure.reason.startswith("RuntimeError: operators cannot be resolved while backends are being registered")
    assert manager.registry.get_implementation("rms_norm", "reference.torch") is not None
    reset_default_manager()
