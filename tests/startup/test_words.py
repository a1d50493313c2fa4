# SPDX-License-Identifier: Apache-2.0
"""Names of installed packages in the settings: valid, found when they are needed, and not before."""

import sys
from pathlib import Path

import pytest
from installed_packages import Packages
from settings_loader import CPU

from sglang_fl import startup
from sglang_fl.cli import main
from sglang_fl.config import SettingsError
from sglang_fl.dispatch import OpManager, PolicyManager, policy_from_config, reset_default_manager
from sglang_fl.dispatch.builtin_ops import ENTRY_POINT_GROUP
from sglang_fl.dispatch.catalog import NOT_COVERED_CLASSES

NOT_COVERED = sorted(NOT_COVERED_CLASSES)[0]
BACKEND = f"""
from sglang_fl.dispatch import BackendImplKind, OpImpl

def register(registry):
    for op in ("chip_sort", {NOT_COVERED!r}):
        registry.register_impl(OpImpl(op, "vendor.mychip", BackendImplKind.VENDOR, print, vendor="mychip"))
"""


@pytest.fixture
def package(packages: Packages) -> str:
    return packages.install(BACKEND, {ENTRY_POINT_GROUP: "{module}:register"})


@pytest.mark.parametrize(
    "environ",
    [
        {"SGLANG_FL_PER_OP": "chip_sort=vendor:mychip|reference"},
        {"SGLANG_FL_PER_OP": "chip_sort=impl:vendor.mychip"},
        {"SGLANG_FL_PER_OP": "rms_norm=vendor:mychip|reference"},
        {"SGLANG_FL_PER_OP": f"{NOT_COVERED}=vendor"},
        {"SGLANG_FL_ALLOW_VENDORS": "mychip"},
    ],
)
def test_a_name_that_only_a_package_has(package: str, environ: dict[str, str]) -> None:
    for check in (startup.check_names, startup.check_settings):
        check(environ, CPU, OpManager())
        assert package in sys.modules


def test_a_kernel_that_nothing_replaces_may_be_left_to_sglang() -> None:
    """And stays so in a policy of the process: no warning."""
    kernel = "sglang.kernels.ops.quantization.fp8_kernel:_static_quant_fp8"
    manager = OpManager()
    settings = startup.check_settings({"SGLANG_FL_PER_OP": f"{kernel}=sglang"}, CPU, manager)
    assert settings.op_backends == ((kernel, ("sglang",)),)
    told = {}
    for order in (f"{kernel}=vendor", f"{kernel}s=sglang"):
        with pytest.raises(SettingsError) as raised:
            startup.check_settings({"SGLANG_FL_PER_OP": order}, CPU, manager)
        told[order] = str(raised.value)
    assert f"nothing replaces SGLang's kernel {kernel} here, so it runs itself: leave it out" in told[f"{kernel}=vendor"]
    assert f"unknown operator '{kernel}s'" in told[f"{kernel}s=sglang"]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SGLANG_FL_PER_OP": "chip_srot=vendor"}, "SGLANG_FL_PER_OP: unknown operator 'chip_srot'; did you mean 'chip_sort'?"),
        ({"SGLANG_FL_PER_OP": "rms_nrom=vendor"}, "SGLANG_FL_PER_OP: unknown operator 'rms_nrom'; did you mean 'rms_norm'?"),
        ({"SGLANG_FL_PER_OP": "chip_sort=vendor:mychp"}, "chip_sort: unknown vendor 'mychp'; did you mean 'mychip'?"),
        ({"SGLANG_FL_PER_OP": "chip_sort=impl:vendor.mychp"}, "unknown implementation 'vendor.mychp'; did you mean 'vendor.mychip'?"),
        ({"SGLANG_FL_PER_OP": "chip_sort=vendor:mychip:"}, "chip_sort: unknown vendor 'mychip:'; did you mean 'mychip'?"),
        ({"SGLANG_FL_DENY_VENDORS": "mychp"}, "SGLANG_FL_DENY_VENDORS: unknown vendor 'mychp'; did you mean 'mychip'?"),
    ],
)  # fmt: skip
def test_a_misspelt_name_gets_the_nearest(package: str, environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        startup.check_names(environ, CPU, OpManager())
    (problem,) = caught.value.problems
    assert message in problem


def test_an_operator_that_no_package_has_and_we_do_not_cover() -> None:
    with pytest.raises(SettingsError, match=f"operator '{NOT_COVERED}' is not covered by this version"):
        startup.check_names({"SGLANG_FL_PER_OP": f"{NOT_COVERED}=vendor"}, CPU, OpManager())


def test_packages_are_imported_only_for_a_name_that_is_not_known_without_them(package: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("op_backends:\n  rms_norm: [vendor:ascend, vendor, flagos, sglang]\ndeny_vendors: [metax]\n")
    startup.check_names({"SGLANG_FL_CONFIG": str(file)}, CPU, OpManager())
    assert package not in sys.modules
    startup.check_names({"SGLANG_FL_PER_OP": "chip_sort=vendor"}, CPU, OpManager())
    assert package in sys.modules


def test_sglang_fl_config_imports_no_package(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    reset_default_manager()
    assert main(["config"]) == 0
    assert package not in sys.modules
    assert "prefer: " in capsys.readouterr().out


def test_the_order_of_such_an_operator_is_what_its_calls_follow(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        BACKEND.replace('"vendor.mychip"', 'f"vendor.{name}"')
        .replace('vendor="mychip"', "vendor=name")
        .replace("print", "lambda x, n=name: n")
    )
    for name in ("achip", "bchip"):
        packages.install(f"name = {name!r}\n{code}", {ENTRY_POINT_GROUP: "{module}:register"}, name=name)
    monkeypatch.setenv("SGLANG_FL_PER_OP", "chip_sort=vendor:bchip|vendor")
    monkeypatch.setattr(startup, "_current", None)
    monkeypatch.setattr(PolicyManager, "_instance", PolicyManager())
    reset_default_manager()
    startup.resolve(CPU)
    from sglang_fl.dispatch import call_op

    assert call_op("chip_sort", None) == "bchip"
    reset_default_manager()


def test_names_in_a_policys_file(package: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    reset_default_manager()
    file.write_text("op_backends:\n  rms_norm: [vendor:ascend]\n")
    assert policy_from_config(file).order_for("rms_norm") == ("vendor:ascend",)
    assert package not in sys.modules
    file.write_text("op_backends:\n  chip_sort: [vendor:mychip]\n")
    assert policy_from_config(file).order_for("chip_sort") == ("vendor:mychip",)
    file.write_text("op_backends:\n  chip_srot: [vendor:mychip]\n")
    with pytest.raises(SettingsError, match=r"policy\.yaml:2: op_backends: unknown operator 'chip_srot'; did you mean 'chip_sort'"):
        policy_from_config(file)
    reset_default_manager()
