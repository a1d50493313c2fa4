# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points
from pathlib import Path
from typing import Any

import pytest
from flagcx_stand_in import header
from installed_packages import Packages

from sglang_fl import __version__
from sglang_fl.cli.doctor import checks
from sglang_fl.cli.doctor.checks import Machine, Problem
from sglang_fl.cli.doctor.diagnosis import Diagnosis, diagnose
from sglang_fl.cli.ops import operator_rows
from sglang_fl.config import Settings
from sglang_fl.device import Device
from sglang_fl.dispatch import OpManager

BACKENDS = "sglang_fl.plugin"


def only_problem(found: Diagnosis) -> Problem:
    (problem,) = found.problems
    assert problem.remedy
    return problem


def test_a_flaggems_that_changed(machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine("metax")
    monkeypatch.setattr(
        "sglang_fl.cli.doctor.checks.changed_signatures", lambda: ["flag_gems/modules/activation.py: there is no gems_silu_and_mul"]
    )
    problem = only_problem(diagnose({}))
    assert problem.what == "flag_gems/modules/activation.py: there is no gems_silu_and_mul"
    assert problem.remedy.startswith("pip install flag_gems==") and not problem.fatal
    assert diagnose({"USE_FLAGGEMS": "0"}).problems == [problem], "layers still would use it"


@pytest.mark.parametrize("strict", [False, True])
def test_an_order_that_cannot_run(strict: bool) -> None:
    """A server stops at such a layer under strict, and the doctor says so before."""
    environ = {"SGLANG_FL_PER_OP": "rms_norm=flagos", "SGLANG_FL_OOT_BLACKLIST": "Gemma4RMSNorm"}
    problem = only_problem(diagnose({**environ, "SGLANG_FL_STRICT": str(int(strict))}))
    assert problem.fatal == strict and problem.what.startswith(
        "rms_norm: no implementation in its order, flagos (SGLANG_FL_PER_OP), is available here"
    )
    assert "RMSNorm, RMSNormWithoutScale; " in problem.what and ("a server stops" in problem.what) == strict
    assert diagnose({**environ, "SGLANG_FL_OOT_WHITELIST": "TopK", "SGLANG_FL_OOT_BLACKLIST": ""}).problems == [], (
        "no such layer is asked for"
    )
    assert diagnose({"SGLANG_FL_PER_OP": "rms_norm=flagos|sglang"}).problems == []


@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_flagcx_of_another_layout(flagcx: Path, strict: str) -> None:
    (flagcx / "build" / "include" / "flagcx.h").write_text(header("0.14.0", without="getVendor"))
    problem = only_problem(diagnose({"FLAGCX_PATH": str(flagcx), "SGLANG_FL_STRICT": strict}))
    assert "struct flagcxDeviceHandle has hostGetDevicePointer where getVendor is expected" in problem.what
    assert problem.fatal == (strict == "1")


def test_a_flagcx_that_is_not_there(tmp_path: Path) -> None:
    problem = only_problem(diagnose({"FLAGCX_PATH": str(tmp_path / "gone")}))
    assert problem.what.startswith(f"FLAGCX_PATH: there is no '{tmp_path}/gone'") and problem.fatal


def test_a_flagcx_that_cannot_be_loaded(flagcx: Path) -> None:
    machine = Machine({}, Device("cpu", "cpu", None, "a test"), OpManager(), deep=True)
    (problem,) = checks.flagcx(machine, Settings(flagcx_path=str(flagcx)))
    assert f"{flagcx}/build/lib/libflagcx.so cannot be loaded: " in problem.what


def test_other_platform_plugin(platforms: Callable[..., None]) -> None:
    platforms("other_chip", "sglang_fl")
    problem = only_problem(diagnose({}))
    assert "other_chip" in problem.what and "sglang_fl" not in problem.what
    assert problem.remedy == "set SGLANG_PLATFORM=sglang_fl"
    assert not problem.fatal
    assert diagnose({"SGLANG_PLATFORM": "sglang_fl"}).problems == []


def test_platform_of_another(platforms: Callable[..., None]) -> None:
    platforms("other_chip", "sglang_fl")
    problem = only_problem(diagnose({"SGLANG_PLATFORM": "other_chip"}))
    assert "SGLANG_PLATFORM=other_chip" in problem.what
    assert not problem.fatal, "a server starts, without this package"


def test_platform_of_nobody() -> None:
    """SGLang itself stops: ``SGLANG_PLATFORM=… not found in discovered platform plugins``."""
    problem = only_problem(diagnose({"SGLANG_PLATFORM": "sglang-fl"}))
    assert "SGLANG_PLATFORM=sglang-fl" in problem.what
    assert problem.fatal


@pytest.mark.parametrize(
    ("plugins", "wrong"),
    [("other", True), ("other, another", True), ("sglang_fl", False), ("other, sglang_fl", False), (" , ", False), ("", False)],
)
def test_plugins_that_are_allowed(plugins: str, wrong: bool) -> None:
    problems = diagnose({"SGLANG_PLUGINS": plugins}).problems
    assert len(problems) == wrong
    for problem in problems:
        assert problem.what.startswith("SGLANG_PLUGINS=other")
        assert "sglang-fl" in problem.what


@pytest.mark.parametrize("names", [(), ("other_chip",)])
def test_entry_points_not_installed(platforms: Callable[..., None], names: tuple[str, ...]) -> None:
    platforms(*names)
    first = diagnose({}).problems[0]
    assert "entry points are not installed" in first.what and first.fatal


@pytest.mark.parametrize(
    ("vendor", "environ", "use"),
    [
        ("nvidia", {}, None),  # its profile has nothing for FlagGems
        ("nvidia", {"SGLANG_FL_PREFER": "flagos"}, "to replace ATen operators on nvidia"),
        ("nvidia", {"SGLANG_FL_PER_OP": "rms_norm=flagos|sglang"}, "by the order of rms_norm$"),
        ("metax", {}, "to replace ATen operators on metax"),
        ("metax", {"USE_FLAGGEMS": "0"}, "by the order of "),
        ("cpu", {"SGLANG_FL_PREFER": "flagos"}, None),
        ("thead", {"SGLANG_FL_PREFER": "flagos"}, None),
    ],
)
def test_flaggems_missing(
    machine: Callable[[str], None], flaggems: Callable[[bool], None], vendor: str, environ: dict[str, str], use: str | None
) -> None:
    machine(vendor)
    flaggems(False)
    problems = diagnose(environ).problems
    assert len(problems) == (use is not None)
    for problem in problems:
        assert re.match(f"FlagGems is not installed, but the settings use it {use}", problem.what)
        assert "flag_gems" in problem.remedy
        assert not problem.fatal


def with_sglang(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(package: str) -> str:
        if package == "sglang" and found is not None:
            return found
        raise PackageNotFoundError(package)

    monkeypatch.setattr("sglang_fl.utils.packages.version", version)
    monkeypatch.setattr("sglang_fl.compat.installed_version", lambda: found)


@pytest.mark.parametrize(("installed", "wrong"), [("0.5.23", False), ("0.5.23.post1", False), ("0.5.24", True), ("0.5.11", True)])
def test_version_of_sglang(monkeypatch: pytest.MonkeyPatch, installed: str, wrong: bool) -> None:
    with_sglang(monkeypatch, installed)
    problems = diagnose({}).problems
    assert len(problems) == wrong
    for problem in problems:
        assert installed in problem.what and ">=0.5.23" in problem.what
        assert problem.remedy == "pip install 'sglang>=0.5.23,<0.5.24'"
        assert not problem.fatal


def test_no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    with_sglang(monkeypatch, None)
    found = diagnose({})
    assert only_problem(found).fatal
    assert found.versions["sglang"] is None and found.versions["sglang-fl"] == __version__


def install_backend(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    found = [EntryPoint(f"entry_of_{module}", f"{module}:register_builtins", BACKENDS) for module in modules]
    monkeypatch.setattr("sglang_fl.utils.packages.entry_points", lambda group: found if group == BACKENDS else [])


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("def register_builtins(registry): raise OSError('libchip.so is missing')", "OSError: libchip.so is missing"),
        ("del register_builtins", "AttributeError: "),
    ],
)
def test_backend_package_that_fails(
    monkeypatch: pytest.MonkeyPatch, backend: Callable[..., str], cli: Callable[..., Any], broken: str, reason: str
) -> None:
    module, sound = backend(broken), backend()
    install_backend(monkeypatch, module, sound)
    found = diagnose({})
    problem = only_problem(found)
    assert f"entry_of_{module}" in problem.what and reason in problem.what
    assert not problem.fatal
    assert f"entry point entry_of_{sound}" in found.backends
    assert f"warning: backend entry point entry_of_{module} is not in use: {reason}" in cli("doctor").out


def test_plugin_module_that_fails_is_told_once_and_is_fatal() -> None:
    problem = only_problem(diagnose({"SGLANG_FL_PLUGIN_MODULES": "no.such.module.at.all"}))
    assert problem.fatal
    assert problem.what.startswith("SGLANG_FL_PLUGIN_MODULES: no.such.module.at.all ")


def test_the_real_entry_points_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_fl.cli.doctor.checks.entry_points", entry_points)
    assert not any("entry points" in problem.what for problem in diagnose({}).problems)


def test_two_backends_that_claim_one_id(backend: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = backend(), backend()
    install_backend(monkeypatch, first, second)
    problem = only_problem(diagnose({}))
    assert problem.fatal and f"entry_of_{first}" in problem.what and f"entry_of_{second}" in problem.what


def test_a_platform_of_a_package_that_is_broken(packages: Packages) -> None:
    module = packages.install("import no_such", {"sglang_fl.platform": "{module}:PLATFORM"})
    problem = only_problem(diagnose({}))
    assert problem.fatal and f"the platform that {module} (entry point {module}) declares cannot be used" in problem.what
    assert "ModuleNotFoundError: No module named 'no_such'" in problem.what


def test_what_only_deep_looks_at_is_said(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_fl.cli.doctor.diagnosis.probe", lambda environ: Device("mychip", "cpu", None, "a test"))
    more = "name='mychip', device_type='cpu', is_present=lambda: True, collective='glo'"
    module = packages.install(
        f"from sglang_fl.vendor_platform import VendorPlatform as V\nPLATFORM = V({more})\n", {"sglang_fl.platform": "{module}:PLATFORM"}
    )
    told = f"the classes, names and values that {module} (entry point {module}) declares; --deep looks at them"
    assert diagnose({}).not_looked_at == told


CHECK = """
from sglang_fl.dispatch import BackendImplKind, OpImpl

def norm(obj, x, residual=None):
    return x

def _is_available():
    raise OSError("libfast.so: cannot open shared object file")

norm._is_available = _is_available

def register(registry):
    registry.register_impl(OpImpl("rms_norm", "vendor.fastchip", BackendImplKind.VENDOR, norm, vendor="fastchip"))
    registry.register_impl(OpImpl("gemma_rms_norm", "vendor.fastchip", BackendImplKind.VENDOR, norm, vendor="fastchip"))
"""


def test_a_check_of_availability_that_raises(packages: Packages) -> None:
    packages.install(CHECK, {BACKENDS: "{module}:register"})
    problem = only_problem(diagnose({}))
    assert not problem.fatal and problem.what.startswith("vendor.fastchip: its availability check raised OSError: libfast.so: cannot open")
    assert problem.what.endswith(", for gemma_rms_norm, rms_norm")


LAZY = """
from sglang_fl.dispatch import BackendImplKind, LazyFunction, OpImpl

def register(registry):
    for op, function in (("rms_norm", LazyFunction("textwrap", "indnt")), ("relu2", LazyFunction("textwrap", "indent"))):
        registry.register_impl(OpImpl(op, "vendor.fastchip", BackendImplKind.VENDOR, function, vendor="fastchip"))
"""


@pytest.mark.parametrize("strict", [False, True])
def test_a_function_that_is_imported_at_its_first_use(packages: Packages, strict: bool) -> None:
    packages.install(LAZY, {BACKENDS: "{module}:register"})
    found = diagnose({})
    assert found.problems == [] and found.not_looked_at == "the functions of vendor.fastchip; --deep looks at them"
    device, settings = Device("cpu", "cpu", None, "a test"), Settings(prefer="vendor", strict=strict)
    manager = OpManager()
    manager.ensure_initialized()
    machine = Machine({}, device, manager, True, settings, operators=operator_rows(manager, settings, device))
    problems = list(checks.importable_functions(machine, settings))
    assert [problem.what for problem in problems] == [
        "vendor.fastchip cannot run relu2: TypeError: relu2: vendor.fastchip: its parameters do not fit relu2(obj, x): it has no parameter "
        "'x'; nothing is passed for its parameter 'prefix'",
        "vendor.fastchip cannot run rms_norm: AttributeError: module 'textwrap' has no attribute 'indnt'; did you mean 'indent'?",
    ]
    assert {problem.fatal for problem in problems} == {strict}


def test_a_package_that_registers_nothing(packages: Packages) -> None:
    module = packages.install("def register(registry):\n    pass\n", {BACKENDS: "{module}:register"})
    problem = only_problem(diagnose({}))
    assert not problem.fatal and problem.what.startswith(f"{module} (entry point {module}) registers nothing")


def test_a_declaration_that_imports_pytorch(packages: Packages) -> None:
    """In a process of its own: PyTorch is imported here."""
    more = "name='fastchip', device_type='cpu', commands=('no-such-tool',)"
    code = f"import torch\nfrom sglang_fl.vendor_platform import VendorPlatform as V\nPLATFORM = V({more})\n"
    module = packages.install(code, {"sglang_fl.platform": "{module}:PLATFORM"})
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages.directory), *filter(None, [os.environ.get("PYTHONPATH")])])}

    def told() -> list[str]:
        done = subprocess.run([sys.executable, "-m", "sglang_fl", "doctor", "--json"], env=environ, capture_output=True, text=True)
        return [problem["what"] for problem in json.loads(done.stdout)["problems"] if module in problem["what"]]

    (problem,) = told()
    assert problem.startswith(f"the module of {module} (entry point {module}) that declares a platform imports torch: ")
    (packages.directory / f"{module}.py").write_text(code.replace("import torch\n", ""))
    assert told() == []


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("SGLANG_FL_TIMER_ENABLE", "SGLANG_FL_TIMER_ENABLE has no effect in sglang-fl: SGLang's profiler"),
        ("VLLM_FL_PREFER", "VLLM_FL_PREFER has no effect in sglang-fl: it is of FlagOS's vLLM plugin; SGLANG_FL_PREFER is read here"),
        ("VLLM_FL_X", "VLLM_FL_X has no effect in sglang-fl: it is of FlagOS's vLLM plugin; sglang-fl config lists what is read here"),
    ],
)
def test_variables_without_meaning_are_warned_of(variable: str, told: str) -> None:
    problem = only_problem(diagnose({variable: "1"}))
    assert not problem.fatal and problem.what.startswith(told)


def test_unknown_platform_in_the_settings() -> None:
    problem = only_problem(diagnose({"SGLANG_FL_PLATFORM": "nvdia"}))
    assert problem.fatal and "'nvidia'" in problem.what
