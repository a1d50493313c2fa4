# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import sglang_fl.config
from sglang_fl.config import OPTIONS, Settings, load_settings
from sglang_fl.device import VENDORS, Device
from sglang_fl.dispatch.manager import reset_default_manager
from sglang_fl.startup.words import flaggems_functions

Run = Callable[..., str]
Cli = Callable[..., "pytest.CaptureResult[str]"]
IN_FILES = [name for name, option in OPTIONS.items() if option.yaml]
SAMPLE = Path(sglang_fl.config.__file__).parent / "sample.yaml"


@pytest.fixture
def config(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``sglang-fl config`` under some variables, and those only; returns what it prints."""

    def run(**environ: str) -> str:
        with monkeypatch.context() as patch:
            for variable, value in environ.items():
                patch.setenv(variable, value)
            reset_default_manager()
            printed = cli("config")
        assert printed.err == ""
        return printed.out

    return run


def values(settings: Settings, names: list[str]) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names}


def in_force(settings: Settings) -> dict[str, Any]:
    """What the settings that a file may have come to. Those about FlagGems may say the same by other lists."""
    excluded = {name for name in flaggems_functions() or () if settings.flagos_exclusion_reason(name)}
    names = [name for name in IN_FILES if name not in ("flagos_whitelist", "flagos_blacklist")]
    return {**values(settings, names), "flagos_functions": settings.flagos_functions, "excluded": excluded}


def test_variables_without_meaning_are_warned_of(config: Run) -> None:
    printed = config(SGLANG_FL_LOG_DIR="/x")
    assert "# warning: SGLANG_FL_LOG_DIR has no effect in sglang-fl" in printed and isinstance(yaml.safe_load(printed), dict)


def settings_on(vendor: str, environ: dict[str, str]) -> Settings:
    row = VENDORS[vendor]
    return load_settings(environ, device=Device(vendor, row.device_type, row.in_tree, "a test"))


ENVIRONMENTS: list[tuple[str, dict[str, str], str]] = [
    ("cpu", {}, ""),
    ("nvidia", {}, ""),
    ("ascend", {}, ""),
    ("amd", {}, ""),
    ("metax", {}, ""),
    ("nvidia", {"SGLANG_FL_PREFER": "vendor"}, ""),
    ("nvidia", {"SGLANG_FL_PER_OP": "rms_norm=vendor:ascend|impl:reference.torch;silu_and_mul=flagos|sglang"}, ""),
    ("cpu", {"SGLANG_FL_STRICT": "1", "SGLANG_FL_DENY_VENDORS": "metax,ascend", "SGLANG_FL_ALLOW_VENDORS": "nvidia"}, ""),
    ("cpu", {"SGLANG_FL_OOT_WHITELIST": "RMSNorm,SiluAndMul", "SGLANG_FL_FLAGOS_BLACKLIST": "mul, to_copy"}, ""),
    ("cpu", {"SGLANG_FL_OOT_WHITELIST": "RMSNorm"}, "oot_blacklist: [SiluAndMul]\n"),
    ("cpu", {"SGLANG_FL_OOT_WHITELIST": ","}, ""),
    ("cpu", {"SGLANG_FL_DIST_BACKEND": "gloo"}, ""),
    ("nvidia", {}, "prefer: reference\ndist_backend: nccl\n"),
    ("nvidia", {}, "op_backends: {rms_norm: reference}\nprefer: vendor\n"),
    ("nvidia", {"SGLANG_FL_PREFER": "flagos"}, "op_backends: {rms_norm: reference}\n"),
    ("nvidia", {}, "op_backends: null\n"),
    ("cpu", {"SGLANG_FL_PLATFORM": "ascend"}, ""),
    ("nvidia", {}, SAMPLE.read_text(encoding="utf-8")),
]


@pytest.mark.parametrize(("vendor", "environ", "text"), ENVIRONMENTS)
def test_saved_output_gives_the_same_settings(
    config: Run, machine: Callable[[str], None], tmp_path: Path, vendor: str, environ: dict[str, str], text: str
) -> None:
    machine(vendor)
    if text:
        (tmp_path / "first.yaml").write_text(text)
        environ = {**environ, "SGLANG_FL_CONFIG": str(tmp_path / "first.yaml")}
    wanted = in_force(settings_on(vendor, environ))
    saved = tmp_path / "saved.yaml"
    saved.write_text(config(**environ))

    alone = {"SGLANG_FL_CONFIG": str(saved)}
    assert in_force(settings_on(vendor, alone)) == wanted
    assert in_force(settings_on(vendor, {**environ, **alone})) == wanted
    assert yaml.safe_load(config(**alone)) == yaml.safe_load(saved.read_text())


def test_what_a_profile_knows_as_broken_is_a_comment_and_stays_so(config: Run, machine: Callable[[str], None], tmp_path: Path) -> None:
    """A saved file must not give FlagGems what the profile says is broken."""
    machine("nvidia")
    broken = settings_on("nvidia", {}).flagos_broken
    assert broken, "the profile knows of something broken"
    printed = config(SGLANG_FL_PREFER="flagos", SGLANG_FL_FLAGOS_BLACKLIST="mm")
    assert "flagos_blacklist: [mm]  # SGLANG_FL_FLAGOS_BLACKLIST" in printed
    assert re.search(rf"^# flagos_broken: \[{', '.join(broken)}\]  # profile nvidia:\d+$", printed, re.MULTILINE)
    assert re.search(r"^# flagos_faster: \[.*\]  # profile nvidia:\d+$", printed, re.MULTILINE)
    saved = tmp_path / "saved.yaml"
    saved.write_text(printed)
    settings = settings_on("nvidia", {"SGLANG_FL_CONFIG": str(saved)})
    assert settings.flagos_functions is None
    assert all(settings.flagos_exclusion_reason(function) for function in ("mm", *broken))


def test_settings_that_only_variables_have_are_given_as_comments(config: Run, backend: Callable[..., str], tmp_path: Path) -> None:
    environ = {
        "SGLANG_FL_OOT_ENABLED": "off",
        "SGLANG_FL_DISPATCH_LOG": str(tmp_path / "dispatch.log"),
        "USE_FLAGGEMS": "0",
        "SGLANG_FLAGGEMS_RECORD": "yes",
        "SGLANG_FLAGGEMS_LOG_PATH": str(tmp_path / "flaggems.log"),
        "SGLANG_FLAGGEMS_LOG_ONCE": "0",
        "SGLANG_FL_PLUGIN_MODULES": f"{backend()} {backend('def register_builtins(registry): pass')}",
        "SGLANG_FL_LOG_LEVEL": "debug",
        "SGLANG_FL_DISPATCH_DEBUG": "1",
        "SGLANG_FL_STRICT": "1",
    }
    saved = tmp_path / "saved.yaml"
    saved.write_text(config(**environ))
    again = {"SGLANG_FL_CONFIG": str(saved)}
    for line in saved.read_text().splitlines()[1:]:
        if line.startswith("# "):
            variable, _, value = line.removeprefix("# ").partition("  # ")[0].partition("=")
            again[variable] = value
    first, second = settings_on("cpu", environ), settings_on("cpu", again)
    assert values(second, list(OPTIONS)) == values(first, list(OPTIONS))


def test_every_setting_says_where_it_comes_from(config: Run, machine: Callable[[str], None], tmp_path: Path) -> None:
    machine("nvidia")
    file = tmp_path / "mine.yaml"
    file.write_text("\nstrict: true\n")
    lines = config(SGLANG_FL_CONFIG=str(file), SGLANG_FL_DENY_VENDORS="metax", SGLANG_FL_LOG_LEVEL="ERROR").splitlines()
    assert lines[0].startswith("# sglang-fl settings; platform nvidia (a test), profile ") and lines[0].endswith("nvidia.yaml")
    assert len(lines) == 1 + len(OPTIONS)
    assert f"strict: true  # {file}:2" in lines
    assert "deny_vendors: [metax]  # SGLANG_FL_DENY_VENDORS" in lines
    assert "# SGLANG_FL_LOG_LEVEL=ERROR  # SGLANG_FL_LOG_LEVEL" in lines
    assert "prefer: flagos  # default" in lines
    assert any(re.fullmatch(r"op_backends: \{.*\}  # profile nvidia:\d+", line) for line in lines)


def test_platform_without_a_profile(config: Run, machine: Callable[[str], None]) -> None:
    machine("metax")
    assert config().splitlines()[0] == "# sglang-fl settings; platform metax (a test), profile none"


def test_a_platform_that_was_chosen_is_not_said_to_be_detected(config: Run) -> None:
    first = config(SGLANG_FL_PLATFORM="ascend").splitlines()[0]
    assert first.startswith("# sglang-fl settings; platform ascend (SGLANG_FL_PLATFORM), profile ")


def test_orders_may_name_what_plugin_modules_bring(config: Run, backend: Callable[..., str]) -> None:
    environ = {
        "SGLANG_FL_PLUGIN_MODULES": backend(),
        "SGLANG_FL_PER_OP": "rms_norm=impl:vendor.testchip",
        "SGLANG_FL_DENY_VENDORS": "testchip",
    }
    assert "op_backends: {rms_norm: ['impl:vendor.testchip']}  # SGLANG_FL_PER_OP" in config(**environ).splitlines()


@pytest.fixture
def failing_config(cli: Cli) -> Run:
    """What it prints as errors."""

    def run(**environ: str) -> str:
        printed = cli("config", code=2, **environ)
        assert printed.out == ""
        return printed.err

    return run


def test_a_mistake_elsewhere_does_not_make_names_of_plugin_modules_unknown(failing_config: Run, backend: Callable[..., str]) -> None:
    order = "rms_norm=impl:vendor.testchip"
    told = failing_config(SGLANG_FL_PLUGIN_MODULES=backend(), SGLANG_FL_PER_OP=order, SGLANG_FL_PREFER="vendr")
    assert "'vendr'" in told and "testchip" not in told


def test_problems_of_names_and_of_modules_are_told_together(failing_config: Run) -> None:
    module = "no.such.module.at.all"
    told = failing_config(SGLANG_FL_PLUGIN_MODULES=module, SGLANG_FL_OOT_BLACKLIST="RMSNrm", SGLANG_FL_PREFER="vendr")
    assert module in told and "RMSNorm" in told and "'vendr'" in told


def test_dispatch_log_that_cannot_be_written(failing_config: Run, tmp_path: Path) -> None:
    path = tmp_path / "none" / "dispatch.log"
    told = failing_config(SGLANG_FL_DISPATCH_LOG=str(path))
    assert "SGLANG_FL_DISPATCH_LOG: " in told and str(path) in told


def test_looking_at_the_settings_makes_no_files(config: Run, tmp_path: Path) -> None:
    config(SGLANG_FL_DISPATCH_LOG=str(tmp_path / "dispatch.log"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", [{}, {"SGLANG_FL_DIST_BACKEND": "flagcx"}])
def test_flagcx_that_is_not_where_its_path_says(failing_config: Run, tmp_path: Path, backend: dict[str, str]) -> None:
    assert f"FLAGCX_PATH: there is no '{tmp_path}/gone'" in failing_config(FLAGCX_PATH=str(tmp_path / "gone"), **backend)
    told = failing_config(FLAGCX_PATH=str(tmp_path), **backend)
    assert f"FLAGCX_PATH: no libflagcx.so in '{tmp_path}' (looked for {tmp_path}/build/lib/libflagcx.so, " in told


def test_flagcx_that_the_loader_does_not_find(failing_config: Run, tmp_path: Path) -> None:
    told = failing_config(SGLANG_FL_DIST_BACKEND="flagcx", LD_LIBRARY_PATH=str(tmp_path))
    assert f"SGLANG_FL_DIST_BACKEND: no libflagcx.so in LD_LIBRARY_PATH ({tmp_path})" in told
