# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sglang_fl.cli.ops import operator_rows, print_operators
from sglang_fl.config import Settings
from sglang_fl.device import Device
from sglang_fl.dispatch import BackendImplKind, OpImpl, OpManager, OpRegistry
from sglang_fl.dispatch.catalog import CLASSES, classes_of
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.trial import TrialRecord, environment

Ops = Callable[..., dict[str, Any]]
Cli = Callable[..., "pytest.CaptureResult[str]"]
#: Where Triton runs, these stay with SGLang.
LEFT_TO_SGLANG = {"causal_conv1d_fn", "causal_conv1d_update", "fused_sigmoid_gating_delta_rule_update"}
REFERENCE, TESTCHIP = "reference(reference.torch)", "vendor(vendor.testchip)"


def test_every_operator_with_its_implementations(ops: Ops) -> None:
    found = ops()
    assert set(OPERATORS) <= found.keys()
    assert (found["device"], found["evidence"], found["layers"]) == ("cpu", "a test", None)
    for op in filter(classes_of, OPERATORS):
        left = " | sglang" if op in LEFT_TO_SGLANG else ""
        assert found[op]["order"] == "reference | flagos | triton | vendor" + left
        assert found[op]["order_from"] == "profile cpu:2"
        assert found[op]["picked"] == REFERENCE
        reference = {"impl": "reference.torch", "kind": "reference", "vendor": None, "available": True, "why": ""}
        reference["certificate"] = "never checked"
        assert found[op]["implementations"][0] == reference


@pytest.mark.parametrize(
    ("environ", "order", "order_from", "picked"),
    [
        ({"SGLANG_FL_PREFER": "vendor"}, "vendor | flagos | triton | reference", "SGLANG_FL_PREFER", TESTCHIP),
        ({"SGLANG_FL_PER_OP": "rms_norm=sglang"}, "sglang", "SGLANG_FL_PER_OP", "sglang"),
        ({"SGLANG_FL_PER_OP": "rms_norm=vendor:testchip|sglang"}, "vendor:testchip | sglang", "SGLANG_FL_PER_OP", TESTCHIP),
        ({"SGLANG_FL_PER_OP": "rms_norm=impl:vendor.testchip"}, "impl:vendor.testchip", "SGLANG_FL_PER_OP", TESTCHIP),
        ({"SGLANG_FL_PER_OP": "rms_norm=vendor:metax|sglang"}, "vendor:metax | sglang", "SGLANG_FL_PER_OP", "sglang"),
        ({"SGLANG_FL_OOT_ENABLED": "0"}, "reference | flagos | triton | vendor", "profile cpu:2", "sglang (Layer 2 is off)"),
    ],
)
def test_order_and_what_comes_of_it(
    ops: Ops, backend: Callable[..., str], environ: dict[str, str], order: str, order_from: str, picked: str
) -> None:
    row = ops(SGLANG_FL_PLUGIN_MODULES=backend(), **environ)["rms_norm"]
    assert (row["order"], row["order_from"], row["picked"]) == (order, order_from, picked)


@pytest.mark.parametrize(
    ("more", "environ", "available", "why"),
    [
        ("", {"SGLANG_FL_PREFER": "vendor"}, True, ""),
        ("", {"SGLANG_FL_PER_OP": "rms_norm=reference"}, True, "not in the order"),
        ("", {"SGLANG_FL_DENY_VENDORS": "testchip"}, True, "vendor testchip is not allowed"),
        ("", {"SGLANG_FL_ALLOW_VENDORS": "metax"}, True, "vendor testchip is not allowed"),
        ("rms_norm._is_available = lambda: False", {}, False, "its availability check returned False"),
        ("rms_norm._is_available = lambda: 1 / 0", {}, False, "its availability check raised ZeroDivisionError: division by zero"),
    ],
)
def test_why_an_implementation_is_not_used(
    ops: Ops, backend: Callable[..., str], more: str, environ: dict[str, str], available: bool, why: str
) -> None:
    row = ops(SGLANG_FL_PLUGIN_MODULES=backend(more), **environ)["rms_norm"]
    (found,) = [impl for impl in row["implementations"] if impl["impl"] == "vendor.testchip"]
    assert found == {
        "impl": "vendor.testchip",
        "kind": "vendor",
        "vendor": "testchip",
        "available": available,
        "why": why,
        "certificate": "never checked",
    }
    assert (row["picked"] == TESTCHIP) == (why == "")


@pytest.mark.parametrize(
    ("vendor", "reason"), [("metax", ""), ("cpu", "FlagGems does not support cpu"), ("thead", "FlagGems does not support thead")]
)
def test_availability_is_that_on_the_device_shown(ops: Ops, machine: Callable[[str], None], vendor: str, reason: str) -> None:
    """And not that on the device that a second look at this process would find."""
    machine(vendor)
    found = ops(SGLANG_FL_PREFER="flagos")
    assert found["device"] == vendor
    (flaggems,) = [impl for impl in found["rms_norm"]["implementations"] if impl["impl"] == "default.flagos"]
    assert (flaggems["available"], flaggems["why"]) == (not reason, reason)
    assert found["rms_norm"]["picked"].startswith("flagos(") == (not reason)


def test_no_implementation_can_run(ops: Ops) -> None:
    row = ops(SGLANG_FL_PER_OP="rms_norm=vendor:metax")["rms_norm"]
    assert row["picked"] == "sglang (no implementation is available: order vendor:metax: vendor:metax: no backend implements it)"


@pytest.mark.parametrize("environ", [{}, {"SGLANG_FL_PER_OP": "rms_norm=vendor:metax|sglang", "SGLANG_FL_PREFER": "flagos"}])
@pytest.mark.parametrize("verb", ["ops", "doctor"])
def test_one_line_an_operator(cli: Cli, verb: str, environ: dict[str, str]) -> None:
    printed = cli(verb, COLUMNS="100", **environ).out.splitlines()
    lines = {line.split()[0]: line.split()[1:] for line in printed if line.startswith("  ") and "─" not in line and line.strip()}
    assert lines.keys() >= set(OPERATORS)
    assert lines["silu_and_mul"] == ["reference.torch", "never"]
    if environ:
        assert lines["rms_norm"] == ["sglang"]
        assert "Order of rms_norm: vendor:metax | sglang (SGLANG_FL_PER_OP)" in printed
        assert "Not available: vendor:metax for rms_norm: no backend implements it" in printed
        assert any(line.startswith("Not available: default.flagos for ") for line in printed), "it stands before what runs"
    else:
        assert "Not available" not in "".join(printed), "what would run comes first in the order"


def test_a_class_that_stays_with_sglang_is_listed(cli: Cli) -> None:
    assert "Stays with SGLang (oot_blacklist): BeamSiluAndMul\n" in cli("ops", SGLANG_FL_OOT_BLACKLIST="BeamSiluAndMul").out


def test_sglangs_kernels_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    registry = OpRegistry()
    for name in ("one", "two"):
        registry.register_impl(OpImpl(f"sglang.srt.module:{name}", "reference.torch", BackendImplKind.REFERENCE, print))
    rows = operator_rows(OpManager(registry), Settings(), Device("cpu", "cpu", None, "a test"))
    print_operators(Console(), rows)
    printed = capsys.readouterr().out
    assert "SGLang's own kernels: 2 on reference.torch; 2 never checked; 'sglang-fl ops --all' lists them" in printed
    assert "sglang.srt.module" not in printed


def test_all(cli: Cli, backend: Callable[..., str]) -> None:
    printed = re.sub(" +", " ", cli("ops", "--all", SGLANG_FL_PLUGIN_MODULES=backend()).out)
    assert "--deep asks PyTorch, as a server does" in printed
    assert "default.flagos not available: FlagGems does not support cpu" in printed
    for text in ("Operators on cpu (a test)", *OPERATORS, "vendor.testchip available", "(profile cpu:2)"):
        assert text in printed
    assert [name for name in CLASSES if name not in printed] == [], "the lists of classes may name these"


@pytest.mark.parametrize("word", ["[red]", "[/dev/chip0]", "[x]", ":warning:"])
def test_reasons_are_printed_as_they_are(cli: Cli, backend: Callable[..., str], word: str) -> None:
    """Square brackets are markup to Rich, and a closing tag without an opening one is an error."""
    module = backend(f"def check(): raise OSError('no device {word}')\nrms_norm._is_available = check")
    assert f"OSError: no device {word}" in cli("ops", "--all", SGLANG_FL_PLUGIN_MODULES=module).out


@pytest.mark.parametrize("argv", [["ops"], ["ops", "--json"]])
def test_settings_that_cannot_be_used(cli: Cli, argv: list[str]) -> None:
    told = "sglang-fl: SGLANG_FL_PER_OP: unknown operator 'rms_nrm'; did you mean 'rms_norm'?\n"
    assert cli(*argv, code=2, SGLANG_FL_PER_OP="rms_nrm=vendor") == ("", told)


def test_deep_asks_pytorch(monkeypatch: pytest.MonkeyPatch, ops: Ops) -> None:
    monkeypatch.setattr("sglang_fl.cli.ops.detect", lambda: Device("nvidia", "cuda", "cuda", "PyTorch"))
    found = ops("--deep", SGLANG_FL_PER_OP="rms_norm=sglang")
    assert (found["device"], found["rms_norm"]["picked"]) == ("nvidia", "sglang")


def test_an_operator_that_nothing_is_bound_to_is_not_picked() -> None:
    registry = OpRegistry()
    registry.register_impl(OpImpl("tomorrow", "vendor.x", BackendImplKind.VENDOR, print, vendor="x"))
    assert [row.picked for row in operator_rows(OpManager(registry), Settings(), Device("cpu", "cpu", None, "a test"))] == [
        "none (SGLang does not call it)"
    ]


def test_what_ended_an_earlier_start_here_is_left_out(ops: Ops, tmp_path: Path) -> None:
    for chip, name in (("cpu cpu", "silu"), ("nvidia NVIDIA H100", "mm")):
        record = TrialRecord(tmp_path / "trials.json", environment(chip))
        record.exclude(name, "it hung")
        record.close()
    record = TrialRecord(tmp_path / "trials.json", environment("cpu cpu"))
    record.exclude("rms_norm: reference.torch", "it crashed")
    record.close()
    environ = {"SGLANG_FL_TRIAL_RECORD": str(tmp_path / "trials.json"), "SGLANG_FL_PREFER": "reference"}
    found = ops(**environ)
    left_out = found["left_out"]
    assert list(left_out) == ["silu", "rms_norm: reference.torch"] and left_out["silu"].startswith("it hung, last on ")
    assert "reference.torch" in found["layer_norm"]["picked"] and found["rms_norm"]["picked"].startswith("sglang")
    whys = [implementation["why"] for implementation in found["rms_norm"]["implementations"]]
    assert [why for why in whys if why.startswith("it ended an earlier start: it crashed, last on ")]
    assert "silu" not in ops(**environ, USE_FLAGGEMS="0")["left_out"]


def test_a_kernel_of_sglangs_that_a_package_replaces(
    ops: Ops, cli: Cli, fastchip: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = "sglang.kernels.ops.memory.common:get_last_loc_triton"
    fastchip(f"sglang_kernels={{{kernel!r}: 'os.path:join'}}")
    row = ops()[kernel]
    assert row["picked"] == "vendor(vendor.fastchip)" and row["order"].endswith("vendor | reference | sglang")
    assert f"{kernel} → vendor.fastchip" in cli("ops").out
    assert ops(SGLANG_FL_PER_OP=f"{kernel}=sglang")[kernel]["picked"] == "sglang"
    for name in (kernel, "get_last_loc_triton"):
        assert ops(SGLANG_FL_OOT_BLACKLIST=name)[kernel]["picked"] == "sglang (oot_blacklist)"
    assert "on sglang (Layer 2 is off); 'sglang-fl ops --all' lists them" in cli("ops", SGLANG_FL_OOT_ENABLED="0").out
    monkeypatch.delenv("SGLANG_FL_OOT_ENABLED")
    assert f"did you mean '{kernel}'?" in cli("ops", code=2, SGLANG_FL_PER_OP=f"{kernel}s=sglang").err


def test_a_kernel_that_this_sglang_does_not_have_is_not_listed_as_replaced(cli: Cli, fastchip: Callable[[str], None]) -> None:
    fastchip("sglang_kernels={'sglang.kernels.ops.memory.common:get_last_loc_tritn': 'os.path:join'}")
    told = "this SGLang has no 'get_last_loc_tritn' in sglang.kernels.ops.memory.common; did you mean 'get_last_loc_triton'?"
    assert told in cli("ops", code=2).err
    assert cli("doctor", code=1).out.count(told) == 1, "without --deep"


def test_a_kernels_function_that_its_package_does_not_have_is_told_without_deep(cli: Cli, fastchip: Callable[[str], None]) -> None:
    fastchip("sglang_kernels={'sglang.kernels.ops.memory.common:get_last_loc_triton': 'textwrap:indnt'}")
    assert "textwrap has no 'indnt'; did you mean 'indent'?" in cli("doctor", code=1).out


def test_a_comparison_of_files_takes_no_model(cli: Cli, tmp_path: Path) -> None:
    err = cli("ops", "--diff", "a.json", "b.json", "--model", str(tmp_path), "--all", code=2).err
    assert err == "sglang-fl: ops --diff compares two files; --all and --model do not go with it\n"
