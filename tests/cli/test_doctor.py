# SPDX-License-Identifier: Apache-2.0
import json
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flagcx_stand_in import header
from installed_packages import Packages

from sglang_fl import __version__
from sglang_fl.cli import main
from sglang_fl.cli.doctor import Diagnosis, Problem, diagnose
from sglang_fl.device.vendors import VENDORS
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.startup.words import flaggems_functions

PLATFORMS = "sglang.srt.platforms"
BACKENDS = "sglang_fl.plugin"


@pytest.fixture
def platforms(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the names of the platform plugins that are installed."""

    def install(*names: str) -> None:
        found = tuple(EntryPoint(name, f"{name}:activate", PLATFORMS) for name in names)
        monkeypatch.setattr("sglang_fl.cli.doctor.entry_points", lambda group: found if group == PLATFORMS else ())

    return install


@pytest.fixture
def flaggems(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether the doctor finds FlagGems."""

    def install(found: bool) -> None:
        util = SimpleNamespace(find_spec=lambda name: object() if name != "flag_gems" or found else None)
        monkeypatch.setattr("sglang_fl.cli.doctor.importlib", SimpleNamespace(util=util))

    return install


@pytest.fixture(autouse=True)
def all_is_well(platforms: Callable[..., None], flaggems: Callable[[bool], None]) -> None:
    platforms("sglang_fl")
    flaggems(True)


def only_problem(found: Diagnosis) -> Problem:
    (problem,) = found.problems
    assert problem.remedy
    return problem


def test_nothing_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose({}).problems == []
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "No problems found." in told
    assert all(word in told for word in (__version__, "Platform and versions", "rms_norm", "profile cpu:2", "gloo"))


@pytest.mark.parametrize(
    ("vendor", "facts"),
    [
        ("cpu", {"platform": "out of tree", "collectives": "gloo", "attention": "torch_native"}),
        ("nvidia", {"platform": "SGLang's own (cuda)", "collectives": "nccl", "attention": "SGLang's choice"}),
        ("ascend", {"platform": "SGLang's own (npu)", "collectives": "hccl", "attention": "ascend"}),
        ("cambricon", {"platform": "out of tree", "device type": "mlu", "collectives": "cncl"}),
    ],
)
def test_device_and_layers(machine: Callable[[str], None], vendor: str, facts: dict[str, str]) -> None:
    machine(vendor)
    found = diagnose({"SGLANG_FL_PER_OP": "rms_norm=sglang;silu_and_mul=reference"})
    assert found.device["vendor"] == vendor and found.device["known by"] == "a test"
    assert facts.items() <= found.device.items()
    states = {row["layer"]: row["state"] for row in found.layers}
    assert list(states) == ["1 ATen operators", *(f"2 {op}" for op in sorted(OPERATORS)), "3 collectives"]
    assert states["2 rms_norm"] == "sglang"
    assert states["2 silu_and_mul"] == "reference(reference.torch)"
    assert states["3 collectives"].startswith(f"{facts['collectives']}, ")


@pytest.mark.parametrize(
    ("vendor", "environ", "state", "why"),
    [
        ("cpu", {}, "off", "FlagGems has nothing for cpu"),
        ("thead", {}, "off", "FlagGems has nothing for thead"),
        ("metax", {}, "all of N functions", "default"),
        ("metax", {"USE_FLAGGEMS": "0"}, "off", "USE_FLAGGEMS"),
        ("metax", {"SGLANG_FL_FLAGOS_WHITELIST": "mul,mm"}, "2 of N functions", "flagos_whitelist (SGLANG_FL_FLAGOS_WHITELIST)"),
        ("metax", {"SGLANG_FL_FLAGOS_BLACKLIST": "mul"}, "N-1 of N functions", "flagos_blacklist (SGLANG_FL_FLAGOS_BLACKLIST)"),
    ],
)
def test_the_state_of_layer_1(machine: Callable[[str], None], vendor: str, environ: dict[str, str], state: str, why: str) -> None:
    machine(vendor)
    known = len(flaggems_functions() or ())
    row = diagnose(environ).layers[0]
    assert row["state"] == state.replace("N-1", str(known - 1)).replace("N", str(known))
    assert row["why"] == why


def test_a_flaggems_that_changed(machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine("metax")
    monkeypatch.setattr(
        "sglang_fl.cli.doctor.changed_signatures", lambda: ["flag_gems/modules/activation.py: there is no gems_silu_and_mul"]
    )
    problem = only_problem(diagnose({}))
    assert problem.what == "flag_gems/modules/activation.py: there is no gems_silu_and_mul"
    assert problem.remedy.startswith("pip install flag_gems==") and not problem.fatal
    assert diagnose({"USE_FLAGGEMS": "0"}).problems == [], "nothing would use it"


@pytest.mark.parametrize("strict", [False, True])
def test_an_order_that_cannot_run(strict: bool) -> None:
    """A server stops at such a layer under strict, and the doctor says so before."""
    environ = {"SGLANG_FL_PER_OP": "rms_norm=flagos", "SGLANG_FL_OOT_BLACKLIST": "Gemma4RMSNorm"}
    problem = only_problem(diagnose({**environ, "SGLANG_FL_STRICT": str(int(strict))}))
    assert problem.fatal == strict and problem.what.startswith("rms_norm: nothing in its order, flagos (SGLANG_FL_PER_OP), can run here")
    assert "RMSNorm, RMSNormWithoutScale; " in problem.what and ("a server stops" in problem.what) == strict
    assert diagnose({**environ, "SGLANG_FL_OOT_WHITELIST": "TopK", "SGLANG_FL_OOT_BLACKLIST": ""}).problems == [], (
        "no such layer is asked for"
    )
    assert diagnose({"SGLANG_FL_PER_OP": "rms_norm=flagos|sglang"}).problems == []


@pytest.mark.parametrize("vendor", VENDORS)
def test_every_platform_runs_something_by_default(machine: Callable[[str], None], vendor: str) -> None:
    machine(vendor)
    assert [problem.what for problem in diagnose({}).problems if "can run here" in problem.what] == []


def test_the_lists_of_classes_are_in_the_state() -> None:
    states = {row["layer"]: row["state"] for row in diagnose({"SGLANG_FL_OOT_BLACKLIST": "SiluAndMul,RMSNorm,TopK"}).layers}
    assert states["2 silu_and_mul"] == states["2 topk"] == "sglang (oot_blacklist)"
    assert states["2 rms_norm"] == "reference(reference.torch); RMSNorm: sglang (oot_blacklist)"
    states = {row["layer"]: row["state"] for row in diagnose({"SGLANG_FL_OOT_WHITELIST": "Gemma3RMSNorm"}).layers}
    assert states["2 gemma_rms_norm"] == "reference(reference.torch); GemmaRMSNorm: sglang (not in oot_whitelist)"
    assert states["2 rms_norm"] == "sglang (not in oot_whitelist)"


def test_layer_2_off() -> None:
    states = [row["state"] for row in diagnose({"SGLANG_FL_OOT_ENABLED": "0"}).layers if row["layer"].startswith("2 ")]
    assert states == ["sglang (Layer 2 is off)"] * len(OPERATORS)


def test_collective_library_that_was_asked_for() -> None:
    row = diagnose({"SGLANG_FL_DIST_BACKEND": "nccl"}).layers[-1]
    assert row == {"layer": "3 collectives", "state": "nccl, through SGLang", "why": "SGLANG_FL_DIST_BACKEND"}


@pytest.fixture
def flagcx(tmp_path: Path) -> Path:
    """A checkout whose header is there; its library is none."""
    (tmp_path / "build" / "lib").mkdir(parents=True)
    (tmp_path / "build" / "include").mkdir()
    (tmp_path / "build" / "lib" / "libflagcx.so").write_text("no library")
    (tmp_path / "build" / "include" / "flagcx.h").write_text(header("0.13.0"))
    return tmp_path


def test_flagcx(flagcx: Path) -> None:
    found = diagnose({"FLAGCX_PATH": str(flagcx)})
    state = f"flagcx 0.13.0 ({flagcx}/build/lib/libflagcx.so); if the ranks do not agree, all take gloo"
    assert found.layers[-1] == {"layer": "3 collectives", "state": state, "why": "FLAGCX_PATH"}
    assert found.problems == []
    by_name = diagnose({"FLAGCX_PATH": str(flagcx), "SGLANG_FL_DIST_BACKEND": "flagcx", "SGLANG_FL_STRICT": "1"}).layers[-1]
    assert by_name["state"].endswith("the server stops") and by_name["why"] == "SGLANG_FL_DIST_BACKEND"
    other = diagnose({"FLAGCX_PATH": str(flagcx), "SGLANG_FL_DIST_BACKEND": "nccl"}).layers[-1]
    assert other["state"] == "nccl, through SGLang"


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
    from sglang_fl.cli.doctor import _flagcx_problems
    from sglang_fl.config import Settings

    (problem,) = _flagcx_problems(Settings(flagcx_path=str(flagcx)), {}, deep=True)
    assert f"{flagcx}/build/lib/libflagcx.so cannot be loaded: " in problem.what


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    data = json.loads(captured.out)
    assert data.keys() == {"device", "versions", "layers", "aten", "backends", "platforms", "problems"}
    assert data["versions"]["sglang-fl"] == __version__
    assert "sglang_fl.dispatch.backends.reference" in data["backends"]
    assert data["problems"] == []


@pytest.mark.parametrize("argv", [["doctor"], ["doctor", "--json"]])
def test_settings_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("strict: 1\nprefr: vendor\n")
    monkeypatch.setenv("SGLANG_FL_CONFIG", str(file))
    monkeypatch.setenv("SGLANG_FL_DIST_BACKEND", "ncl")
    assert main(argv) == 1
    told = capsys.readouterr().out
    wanted = [
        f"{file}:2: unknown key 'prefr'; did you mean 'prefer'?",
        "SGLANG_FL_DIST_BACKEND: unknown value 'ncl'; did you mean 'nccl'?",
    ]
    if "--json" in argv:
        data = json.loads(told)
        assert [problem["what"] for problem in data["problems"] if problem["fatal"]] == wanted
        assert data["layers"] == []
    else:
        assert [line.removeprefix("ERROR: ") for line in told.splitlines() if line.startswith("ERROR: ")] == wanted


def test_unknown_platform_in_the_settings() -> None:
    problem = only_problem(diagnose({"SGLANG_FL_PLATFORM": "nvdia"}))
    assert problem.fatal and "'nvidia'" in problem.what


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
        ("nvidia", {"SGLANG_FL_PREFER": "flagos"}, "serves nvidia"),
        ("nvidia", {"SGLANG_FL_PER_OP": "rms_norm=flagos|sglang"}, "would run rms_norm$"),
        ("metax", {}, "serves metax"),
        ("metax", {"USE_FLAGGEMS": "0"}, None),
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
        assert re.match(f"FlagGems is not installed, and {use}", problem.what)
        assert "flag_gems" in problem.remedy
        assert not problem.fatal


def with_sglang(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(package: str) -> str:
        if package == "sglang" and found is not None:
            return found
        raise PackageNotFoundError(package)

    monkeypatch.setattr("sglang_fl.cli.doctor.version", version)
    wanted = ["sglang<0.5.24,>=0.5.23", "rich>=13", 'pytest>=8; extra == "test"']
    monkeypatch.setattr("sglang_fl.cli.doctor.requires", lambda package: wanted)


@pytest.mark.parametrize(("installed", "wrong"), [("0.5.23", False), ("0.5.23.post1", False), ("0.5.24", True), ("0.5.11", True)])
def test_version_of_sglang(monkeypatch: pytest.MonkeyPatch, installed: str, wrong: bool) -> None:
    with_sglang(monkeypatch, installed)
    problems = diagnose({}).problems
    assert len(problems) == wrong
    for problem in problems:
        assert installed in problem.what and ">=0.5.23" in problem.what
        assert problem.remedy == "pip install 'sglang<0.5.24,>=0.5.23'"
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
    monkeypatch: pytest.MonkeyPatch, backend: Callable[..., str], capsys: pytest.CaptureFixture[str], broken: str, reason: str
) -> None:
    module, sound = backend(broken), backend()
    install_backend(monkeypatch, module, sound)
    found = diagnose({})
    problem = only_problem(found)
    assert f"entry_of_{module}" in problem.what and reason in problem.what
    assert not problem.fatal
    assert f"entry point entry_of_{sound}" in found.backends

    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert f"warning: backend entry point entry_of_{module} is not in use: {reason}" in told


def test_plugin_module_that_fails_is_told_once_and_is_fatal() -> None:
    problem = only_problem(diagnose({"SGLANG_FL_PLUGIN_MODULES": "no.such.module.at.all"}))
    assert problem.fatal
    assert problem.what.startswith("SGLANG_FL_PLUGIN_MODULES: no.such.module.at.all ")


def test_several_problems_at_once(platforms: Callable[..., None], flaggems: Callable[[bool], None], machine: Callable[[str], None]) -> None:
    machine("nvidia")
    platforms("other_chip", "sglang_fl")
    flaggems(False)
    problems = diagnose({"SGLANG_PLUGINS": "other", "SGLANG_FL_PREFER": "vendr", "SGLANG_FL_STRICT": "2"}).problems
    assert len(problems) == 4
    assert [problem.fatal for problem in problems] == [False, False, True, True]


def test_file_names_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Square brackets are markup to Rich."""
    directory = tmp_path / "a[b]c[red]"
    directory.mkdir()
    (directory / "mine.yaml").write_text("dist_backend: gloo\n")
    monkeypatch.setenv("SGLANG_FL_CONFIG", str(directory / "mine.yaml"))
    assert main(["doctor"]) == 0
    assert "a[b]c[red]/mine.yaml:1" in capsys.readouterr().out


def test_deep_asks_pytorch_and_checks_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_fl import compat
    from sglang_fl.device import Device

    def broken() -> None:
        raise compat.IncompatibleSGLang("SGLang lacks something")

    asked: list[Any] = []
    monkeypatch.setattr("sglang_fl.cli.doctor.detect", lambda: asked.append(1) or Device("metax", "cuda", None, "PyTorch"))
    monkeypatch.setattr(compat, "check_platform", lambda: None)
    monkeypatch.setattr(compat, "check_groups", lambda: None)
    monkeypatch.setattr(compat, "check_layers", broken)
    found = diagnose({"USE_FLAGGEMS": "0"}, deep=True)
    assert asked and found.device["vendor"] == "metax"
    assert found.aten is not None and found.aten["off"] == "USE_FLAGGEMS=0 (USE_FLAGGEMS)"
    assert only_problem(found) == Problem("SGLang lacks something", "install a supported SGLang", fatal=True)


def test_the_real_entry_points_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_fl.cli.doctor.entry_points", entry_points)
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
