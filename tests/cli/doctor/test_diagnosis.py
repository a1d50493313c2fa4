# SPDX-License-Identifier: Apache-2.0
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from no_home import without_home

from sglang_fl import __version__
from sglang_fl.cli.doctor.diagnosis import diagnose
from sglang_fl.device import VENDORS, Device
from sglang_fl.dispatch.catalog import classes_of
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.startup.words import flaggems_functions
from sglang_fl.trial import TrialRecord

Cli = Callable[..., "pytest.CaptureResult[str]"]


def test_nothing_wrong(cli: Cli) -> None:
    assert diagnose({}).problems == []
    told = cli("doctor").out
    assert "No problems found." in told
    assert all(word in told for word in (__version__, "Platform and versions", "rms_norm", "profile cpu:2", "gloo"))


@pytest.mark.parametrize(
    ("vendor", "facts"),
    [
        ("cpu", {"platform": "out of tree", "collectives": "gloo", "attention": "torch_native"}),
        ("nvidia", {"platform": "SGLang's own (cuda)", "collectives": "nccl", "attention": "chosen by SGLang"}),
        ("ascend", {"platform": "SGLang's own (npu)", "collectives": "hccl", "attention": "ascend"}),
        ("cambricon", {"platform": "out of tree", "device type": "mlu", "collectives": "cncl"}),
    ],
)
def test_device_and_layers(machine: Callable[[str], None], vendor: str, facts: dict[str, str]) -> None:
    machine(vendor)
    found = diagnose({"SGLANG_FL_PER_OP": "rms_norm=sglang;silu_and_mul=reference"})
    assert found.device["vendor"] == vendor and found.device["detected by"] == "a test"
    assert facts.items() <= found.device.items()
    states = {row["layer"]: row["state"] for row in found.layers}
    kernels = ["2 SGLang's own kernels"] if vendor == "cpu" else []  # those with Triton have no references
    assert list(states) == ["1 ATen operators", *(f"2 {op}" for op in sorted(OPERATORS)), *kernels, "3 collectives"]
    assert states["2 rms_norm"] == "sglang"
    assert states["2 silu_and_mul"] == "reference(reference.torch)"
    assert [row["checked"] for row in found.layers if row["layer"] in ("2 rms_norm", "2 silu_and_mul")] == ["", "never checked"]
    assert states["3 collectives"].startswith(f"{facts['collectives']}, ")


@pytest.mark.parametrize(
    ("vendor", "environ", "state", "why"),
    [
        ("cpu", {}, "off", "FlagGems does not support cpu"),
        ("thead", {}, "off", "FlagGems does not support thead"),
        ("metax", {}, "all of N functions", "prefer (default)"),
        ("metax", {"USE_FLAGGEMS": "0"}, "off", "USE_FLAGGEMS"),
        ("metax", {"SGLANG_FL_FLAGOS_WHITELIST": "mul,mm"}, "2 of N functions", "flagos_whitelist (SGLANG_FL_FLAGOS_WHITELIST)"),
        ("metax", {"SGLANG_FL_FLAGOS_BLACKLIST": "mul"}, "N-2 of N functions", "flagos_blacklist (SGLANG_FL_FLAGOS_BLACKLIST)"),
    ],
)
def test_the_state_of_layer_1(machine: Callable[[str], None], vendor: str, environ: dict[str, str], state: str, why: str) -> None:
    machine(vendor)
    known = len(flaggems_functions() or ())
    row = diagnose(environ).layers[0]
    assert row["state"] == state.replace("N-2", str(known - 2)).replace("N", str(known))
    assert row["why"] == why


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
    states = [row["state"] for row in diagnose({"SGLANG_FL_OOT_ENABLED": "0"}).layers if classes_of(row["layer"].removeprefix("2 "))]
    assert set(states) == {"sglang (Layer 2 is off)"}


def test_collective_library_that_was_asked_for() -> None:
    row = diagnose({"SGLANG_FL_DIST_BACKEND": "nccl"}).layers[-1]
    assert row == {"layer": "3 collectives", "state": "nccl, through SGLang", "why": "SGLANG_FL_DIST_BACKEND", "checked": ""}


def test_flagcx(flagcx: Path) -> None:
    found = diagnose({"FLAGCX_PATH": str(flagcx)})
    state = f"flagcx 0.13.0 ({flagcx}/build/lib/libflagcx.so); if the ranks do not agree, all use gloo"
    assert found.layers[-1] == {"layer": "3 collectives", "state": state, "why": "FLAGCX_PATH", "checked": ""}
    assert found.problems == []
    by_name = diagnose({"FLAGCX_PATH": str(flagcx), "SGLANG_FL_DIST_BACKEND": "flagcx", "SGLANG_FL_STRICT": "1"}).layers[-1]
    assert by_name["state"].endswith("the server stops") and by_name["why"] == "SGLANG_FL_DIST_BACKEND"
    other = diagnose({"FLAGCX_PATH": str(flagcx), "SGLANG_FL_DIST_BACKEND": "nccl"}).layers[-1]
    assert other["state"] == "nccl, through SGLang"


def test_json(cli: Cli) -> None:
    captured = cli("doctor", "--json")
    assert captured.err == ""
    data = json.loads(captured.out)
    facts = {
        "device",
        "versions",
        "layers",
        "operators",
        "aten",
        "backends",
        "platforms",
        "changes",
        "problems",
        "trials",
        "start",
        "not_looked_at",
    }
    assert data.keys() == facts
    assert data["versions"]["sglang-fl"] == __version__
    assert "sglang_fl.dispatch.backends.reference" in data["backends"]
    assert data["problems"] == []


@pytest.mark.parametrize("argv", [["doctor"], ["doctor", "--json"]])
def test_settings_that_cannot_be_used(cli: Cli, tmp_path: Path, argv: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("strict: 1\nprefr: vendor\n")
    told = cli(*argv, code=1, SGLANG_FL_CONFIG=str(file), SGLANG_FL_DIST_BACKEND="ncl").out
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


def test_several_problems_at_once(platforms: Callable[..., None], flaggems: Callable[[bool], None], machine: Callable[[str], None]) -> None:
    machine("nvidia")
    platforms("other_chip", "sglang_fl")
    flaggems(False)
    problems = diagnose({"SGLANG_PLUGINS": "other", "SGLANG_FL_PREFER": "vendr", "SGLANG_FL_STRICT": "2"}).problems
    assert len(problems) == 4
    assert [problem.fatal for problem in problems] == [False, False, True, True]


def test_file_names_are_printed_as_they_are(cli: Cli, tmp_path: Path) -> None:
    """Square brackets are markup to Rich."""
    directory = tmp_path / "a[b]c[red]"
    directory.mkdir()
    (directory / "mine.yaml").write_text("dist_backend: gloo\n")
    assert "a[b]c[red]/mine.yaml:1" in cli("doctor", SGLANG_FL_CONFIG=str(directory / "mine.yaml")).out


@pytest.mark.parametrize("strict", ["0", "1"])
def test_deep_asks_pytorch_and_checks_sglang(strict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_fl import compat

    asked: list[Any] = []
    monkeypatch.setattr("sglang_fl.cli.doctor.diagnosis.detect", lambda: asked.append(1) or Device("metax", "cuda", None, "PyTorch"))
    monkeypatch.setattr(compat, "binding_problems", lambda: ("something is missing",))
    monkeypatch.setattr(compat, "group_problems", lambda: ())
    found = diagnose({"USE_FLAGGEMS": "0", "SGLANG_FL_STRICT": strict}, deep=True)
    assert asked and found.device["vendor"] == "metax"
    assert found.aten is not None and found.aten["off"] == "USE_FLAGGEMS=0 (USE_FLAGGEMS)"
    (problem,) = found.problems
    assert "  - something is missing\n" in problem.what and problem.remedy.startswith("pip install 'sglang>=")
    assert problem.fatal is (strict == "1"), "otherwise a server starts, and everything is left to SGLang"


def test_what_ended_earlier_starts(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trials.json"
    monkeypatch.setenv("SGLANG_FL_TRIAL_RECORD", str(path))
    assert diagnose(os.environ).trials == {"record": str(path), "deaths": {}}
    record = TrialRecord(path, "torch 2, a chip")
    record.exclude("mul", "its process ended with 'Aborted'")
    record.close()
    killed = path.with_name("trials.json.9-0a0b0c0d")
    killed.write_text('{"environment": "torch 2, a chip", "start": 1}\nmm\n')
    printed = cli("doctor").out.replace("\n", " ")
    assert "Excluded from starts with torch 2, a chip" in printed and "its process ended with 'Aborted', last on" in printed
    assert "its process was killed, last on" in printed and "; excluded after the next time" in printed
    assert [cli("doctor", "--forget").out for _ in range(2)] == [f"{path}: removed\n", f"{path}: nothing to remove\n"]
    assert diagnose(os.environ).trials["deaths"] == {}


def test_a_damaged_record(tmp_path: Path, cli: Cli, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trials.json"
    monkeypatch.setenv("SGLANG_FL_TRIAL_RECORD", str(path))
    path.write_text('{"a chip": {"mul": {"reason": "x", "date": "d", "count": "2"}, "mm": {"reason": "it hung", "date": "d"}}}')
    assert "it hung, last on d" in cli("doctor").out
    assert "ignored: 'mul' of 'a chip'" in caplog.text
    assert cli("doctor", "--forget").out == f"{path}: removed\n" and not path.exists()


def test_a_record_that_cannot_be_removed(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = tmp_path / "sglang-fl" / "trials.json"
    path.mkdir(parents=True)
    assert "No problems found." in cli("doctor").out
    out, err = cli("doctor", "--forget", code=1)
    assert (out, err.startswith(f"sglang-fl: the record of trials {path} cannot be removed: ")) == ("", True) and path.exists()


@pytest.mark.parametrize("argv", [["doctor", "--forget"], ["ops", "--json"]])
@pytest.mark.parametrize("at", ["~nobody-of-this-name/x", "{}/socket", "{}"])
def test_a_record_where_no_file_can_be(tmp_path: Path, cli: Cli, argv: list[str], at: str) -> None:
    """A socket stands for a device: a mistake must not remove the machine's own."""
    socket, at = tmp_path / "socket", at.format(tmp_path)
    os.mknod(socket, stat.S_IFSOCK | 0o600)
    out, err = cli(*argv, code=2, SGLANG_FL_TRIAL_RECORD=at)
    assert out == "" and err.startswith("sglang-fl: SGLANG_FL_TRIAL_RECORD: expected a file, found ") and repr(at) in err
    assert "ERROR: SGLANG_FL_TRIAL_RECORD: expected a file, found" in cli("doctor", code=1).out and socket.is_socket()


def test_a_user_without_a_home(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    without_home(monkeypatch)
    told = "no place for the record of trials: this user has no home directory. Set HOME or XDG_STATE_HOME or SGLANG_FL_TRIAL_RECORD"
    assert f"warning: {told}" in cli("doctor").out
    assert cli("doctor", "--forget", code=2).err.startswith(f"sglang-fl: {told}")
    assert json.loads(cli("ops", "--json").out)["left_out"] == {}
    told = "sglang-fl: no place for what FlagGems tunes in a check: this user has no home directory. Set HOME or XDG_CACHE_HOME\n"
    assert cli("check", "--op", "relu2", code=2).err == told


@pytest.mark.parametrize(
    ("stood_in", "told"),
    [
        ({}, "python -m sglang.launch_server"),
        (
            {"flashinfer": "is not installed"},
            "python -m sglang.launch_server (flashinfer is not installed: what stands in is there in time)",
        ),
        (
            {"sgl_kernel": "is not installed", "triton": "is not installed"},
            "sglang-fl serve (triton is not installed; the package of cpu stands in for it, and python -m sglang.launch_server imports",
        ),
    ],
)
def test_the_command_that_starts_a_server(monkeypatch: pytest.MonkeyPatch, cli: Cli, stood_in: dict[str, str], told: str) -> None:
    monkeypatch.setattr("sglang_fl.cli.doctor.diagnosis.stand_in_for_absent_packages", lambda device: stood_in)
    assert f"Start a server with: {told}" in cli("doctor").out


def test_a_package_that_can_be_imported_so_that_nothing_stands_in_for_it(
    fastchip: Callable[[str], None], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastchip("stand_ins={'deep_gemm': None}")
    monkeypatch.setattr("sglang_fl.platform.absent_packages._why_not_used", lambda package, device: None)
    told = cli("doctor").out
    assert "warning: deep_gemm can be imported, so nothing stands in for it, though chip_" in told
    assert "→ if that build is not for this chip, uninstall deep_gemm, or have the package name it in hide_installed" in told
