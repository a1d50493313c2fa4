# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from installed_packages import Packages

from sglang_fl.cli import main
from sglang_fl.device import ENTRY_POINT_GROUP, VENDORS, Device
from sglang_fl.dispatch.manager import reset_default_manager

Ops = Callable[..., dict[str, Any]]
#: Called with the command line, the exit code that is expected (0) and further variables.
Cli = Callable[..., "pytest.CaptureResult[str]"]

_BACKEND = """
from sglang_fl.dispatch import BackendImplKind, OpImpl

def rms_norm(obj, x, residual=None):
    raise NotImplementedError

def register_builtins(registry):
    registry.register_impl(OpImpl("rms_norm", "vendor.testchip", BackendImplKind.VENDOR, rms_norm, vendor="testchip", priority=1000))
"""


@pytest.fixture(autouse=True)
def fresh_manager() -> Iterator[None]:
    """Every command line has a process, and so a manager, of its own."""
    reset_default_manager()
    yield
    reset_default_manager()


@pytest.fixture(autouse=True)
def wide_terminal_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def nothing_was_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the command line see a vendor's machine."""

    def make(name: str) -> None:
        vendor = VENDORS[name]
        device = Device(name, vendor.device_type, vendor.in_tree, "a test")
        for module in ("bisect", "config", "doctor.diagnosis", "ops"):
            monkeypatch.setattr(f"sglang_fl.cli.{module}.probe", lambda environ=None: device)

    return make


@pytest.fixture(autouse=True)
def plain_machine(machine: Callable[[str], None]) -> None:
    machine("cpu")


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts a backend for rms_norm of the vendor testchip on the path; returns its module's name."""
    count = 0

    def make(more: str = "") -> str:
        nonlocal count
        count += 1
        name = f"backend_of_a_test_{tmp_path.name.replace('-', '_')}_{count}"
        (tmp_path / f"{name}.py").write_text(f"{_BACKEND}\n{more}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        return name

    return make


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command; returns what it prints."""

    def run(*argv: str, code: int = 0, **environ: str) -> "pytest.CaptureResult[str]":
        capsys.readouterr()
        for variable, value in environ.items():
            monkeypatch.setenv(variable, value)
        assert main(argv) == code
        return capsys.readouterr()

    return run


@pytest.fixture
def ops(cli: Cli) -> Ops:
    """Runs ``sglang-fl ops --json`` with further arguments and variables; returns the operators by name, and the layers."""

    def run(*arguments: str, **environ: str) -> dict[str, Any]:
        printed = cli("ops", "--json", *arguments, **environ)
        assert printed.err == ""
        data = json.loads(printed.out)
        return {
            **{row["op"]: row for row in data["operators"]},
            "layers": data.get("layers"),
            **{name: data[name] for name in ("device", "evidence", "left_out")},
        }

    return run


@pytest.fixture
def fastchip(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs a package that brings up a chip, seen by the command line, with further fields of its declaration."""

    def install(fields: str) -> None:
        code = f"VendorPlatform(name='fastchip', device_type='cpu', is_present=lambda: True, {fields})"
        packages.install(
            f"from sglang_fl.vendor_platform import VendorPlatform\nPLATFORM = {code}", {ENTRY_POINT_GROUP: "{module}:PLATFORM"}
        )
        for module in ("doctor.diagnosis", "kernels", "ops"):
            monkeypatch.setattr(f"sglang_fl.cli.{module}.probe", lambda environ=None: Device("fastchip", "cpu", None, "a test"))

    return install


@pytest.fixture
def model(tmp_path: Path) -> Callable[[Any], str]:
    """Writes a config.json; returns its directory."""

    def write(config: Any) -> str:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return str(tmp_path)

    return write
