# SPDX-License-Identifier: Apache-2.0
"""Layer 1: what is registered with PyTorch's dispatcher, with the real FlagGems and no device."""

import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flaggems_here import gems

from sglang_fl import aten, compat
from sglang_fl.aten import AtenOperators, AtenReport, Recorder, replace_operators, restore_operators, scope, why_off
from sglang_fl.config import Settings, Source
from sglang_fl.device import Device
from sglang_fl.dispatch.backends.flaggems.library import NOT_INSTALLED
from sglang_fl.startup.words import flaggems_functions

__all__ = ["gems"]

NVIDIA = Device("nvidia", "cuda", "cuda", "a test")
CPU = Device("cpu", "cpu", None, "a test")


def settings(**values: Any) -> Settings:
    return Settings(**values, sources={name: Source(3, f"the test's {name}") for name in values})


@pytest.fixture(autouse=True)
def everything_given_back() -> Iterator[None]:
    yield
    restore_operators()
    if AtenOperators._on is not None:
        AtenOperators._on.disable()


def kernel(operator: str) -> str:
    """Where the dispatcher's kernel for the device comes from: the first of its lines is the one in force."""
    return next(line for line in torch._C._dispatch_dump(f"aten::{operator}").splitlines() if line.startswith("CUDA"))


def is_ours(operator: str) -> bool:
    return ".py:" in kernel(operator)


def test_everything_is_replaced_and_given_back(gems: ModuleType) -> None:
    native = kernel("mul.Tensor")
    assert not is_ours("mul.Tensor")
    with AtenOperators(Settings()) as report:
        assert is_ours("mul.Tensor") and is_ours("mm")
        replaced = dict(report.replaced)
        assert replaced["mul.Tensor"] == "mul" and replaced["mm"] == "mm"
        assert set(replaced.values()) | {name for _, name, _ in report.left} == flaggems_functions()
        assert report.off is None and str(len(replaced)) in report.summary()
    assert kernel("mul.Tensor") == native and not is_ours("mm")


def test_off_and_on_again(gems: ModuleType) -> None:
    operators = AtenOperators(settings(flagos_whitelist=("mul",)))
    for _ in range(3):
        operators.enable()
        assert is_ours("mul.Tensor")
        assert operators.enable() is operators.report, "enabling twice is enabling once"
        operators.disable()
        operators.disable()
        assert not is_ours("mul.Tensor")


def test_whitelist(gems: ModuleType) -> None:
    with AtenOperators(settings(flagos_whitelist=("mul", "mm"))) as report:
        assert {function for _, function in report.replaced} == {"mul", "mm"}
        assert is_ours("mm") and not is_ours("add.Tensor")
        reasons = report.left_by_reason()
        assert list(reasons) == ["not in flagos_whitelist (the test's flagos_whitelist)"]
        assert {"mul", "mm"}.isdisjoint(*reasons.values()) and "add" in reasons[next(iter(reasons))]


def test_blacklist(gems: ModuleType) -> None:
    with AtenOperators(settings(flagos_blacklist=("mul",))) as report:
        assert not is_ours("mul.Tensor") and is_ours("add.Tensor")
        assert ("mul.Tensor", "mul", "flagos_blacklist (the test's flagos_blacklist)") in report.left
        assert report.left_by_reason()["flagos_blacklist (the test's flagos_blacklist)"] == ["mul"]


def test_what_a_profile_measured(gems: ModuleType) -> None:
    """Faster functions are those in use, broken ones are not; both are named in the reasons with where they come from."""
    with AtenOperators(settings(flagos_faster=("mul", "mm"), flagos_broken=("mm",), flagos_blacklist=("add",))) as report:
        assert {function for _, function in report.replaced} == {"mul"}
        reasons = report.left_by_reason()
        assert reasons["flagos_broken (the test's flagos_broken)"] == ["mm"]
        assert reasons["flagos_blacklist (the test's flagos_blacklist)"] == ["add"]
        assert "sub" in reasons["not in flagos_faster (the test's flagos_faster)"]


def test_a_user_who_prefers_flagos_gets_all_that_is_not_broken(gems: ModuleType) -> None:
    with AtenOperators(settings(prefer="flagos", flagos_faster=(), flagos_broken=("mul",))) as report:
        assert is_ours("mm") and is_ours("add.Tensor") and not is_ours("mul.Tensor")
        assert report.left_by_reason()["flagos_broken (the test's flagos_broken)"] == ["mul"]


def test_functions_can_be_switched_one_by_one(gems: ModuleType) -> None:
    operators = AtenOperators(settings(flagos_whitelist=("mul", "mm")))
    with pytest.raises(RuntimeError, match="is off"):
        operators.switch("mul", on=False)
    with operators:
        operators.switch("mul", on=False)
        operators.switch("mul", on=False)
        assert not is_ours("mul.Tensor") and is_ours("mm")
        operators.switch("mul", on=True)
        assert is_ours("mul.Tensor")
        operators.switch("mm", on=False)
        with pytest.raises(ValueError, match=r"replaces nothing with 'mmm' here; did you mean 'mm'\?"):
            operators.switch("mmm", on=True)
    assert not is_ours("mul.Tensor") and not is_ours("mm")
    with operators:
        assert is_ours("mul.Tensor") and is_ours("mm"), "enabling switches all of them on"


def test_a_thousand_switches_leave_the_dispatcher_as_it_was(gems: ModuleType) -> None:
    """Also of functions that replace several operators."""
    operators = AtenOperators(Settings())
    keys = [key for key, _ in operators.enable().replaced]
    operators.disable()
    before = {key: torch._C._dispatch_dump(f"aten::{key}") for key in keys}
    several = [function for function, rows in operators._functions.items() if len(rows) > 1]
    assert len(several) > 10
    with operators:
        for _ in range(1000 // (2 * len(several)) + 1):
            for on in (False, True):
                for function in several:
                    operators.switch(function, on)
    assert {key: torch._C._dispatch_dump(f"aten::{key}") for key in keys} == before


class Backend:
    """Stands for one of SGLang's graph backends: what it captures tells whose operator is in force."""

    def capture_one(self, shape_key: int, forward_fn: Any) -> bool:
        forward_fn()
        return is_ours("mul.Tensor")


@pytest.fixture
def resolvers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """SGLang's two functions that give a runner its graph backend, which need a GPU here."""
    from sglang.srt.model_executor.runner_backend import utils
    from sglang.srt.plugins.hook_registry import HookRegistry

    for target in scope.RESOLVERS:
        name = target.rpartition(".")[2]
        assert len(inspect.signature(getattr(utils, name)).parameters) == 1
        monkeypatch.setattr(utils, name, lambda cuda_graph_runner: Backend())
    yield utils
    restore_operators()
    HookRegistry.reset()
    scope._hooked.clear()


def in_graphs(**values: Any) -> Settings:
    return settings(flagos_whitelist=("mul",), flagos_scope="graphs", **values)


def test_in_graphs_operators_are_in_force_while_a_graph_is_captured(gems: ModuleType, resolvers: ModuleType) -> None:
    report = replace_operators(in_graphs(), NVIDIA, captures_graphs=True)
    assert dict(report.replaced)["mul.Tensor"] == "mul" and "with 1 functions in graphs" in report.summary()
    assert not is_ours("mul.Tensor")
    for resolve in (resolvers.resolve_decode_backend, resolvers.resolve_prefill_backend):
        backend = resolve(None)
        for _ in range(2):
            assert backend.capture_one(1, forward_fn=lambda: None)
            assert not is_ours("mul.Tensor")
        with pytest.raises(ArithmeticError):
            backend.capture_one(1, forward_fn=lambda: 1 / 0)
        assert not is_ours("mul.Tensor"), "also after an exception"
    restore_operators()
    assert not backend.capture_one(1, forward_fn=lambda: None)


def test_a_second_load_with_another_scope_is_followed(gems: ModuleType, resolvers: ModuleType) -> None:
    replace_operators(in_graphs(), NVIDIA, captures_graphs=True)
    backend = resolvers.resolve_decode_backend(None)
    replace_operators(settings(flagos_whitelist=("mul",)), NVIDIA, captures_graphs=True)
    assert is_ours("mul.Tensor")
    replace_operators(in_graphs(), NVIDIA, captures_graphs=True)
    assert not is_ours("mul.Tensor") and backend.capture_one(1, forward_fn=lambda: None)


def test_where_no_graph_is_captured_nothing_is_replaced_and_the_log_says_so(gems: ModuleType) -> None:
    report = replace_operators(in_graphs(), NVIDIA, captures_graphs=False)
    assert report.off == "flagos_scope is graphs (the test's flagos_scope), and this server captures none; everywhere works, but slower"
    assert not is_ours("mul.Tensor")


@pytest.mark.parametrize("strict", [False, True])
def test_a_hook_that_sglang_does_not_take(gems: ModuleType, monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    monkeypatch.setattr(scope, "hook", lambda target, function: False)
    if strict:
        with pytest.raises(RuntimeError, match=r"did not take the hook on .*resolve_decode_backend"):
            replace_operators(in_graphs(strict=True), NVIDIA, captures_graphs=True)
    else:
        assert "did not take the hook" in str(replace_operators(in_graphs(), NVIDIA, captures_graphs=True).off)
    assert not is_ours("mul.Tensor") and scope._in_graphs is None


def test_one_set_at_a_time(gems: ModuleType) -> None:
    with AtenOperators(settings(flagos_whitelist=("mul",))):
        other = AtenOperators(settings(flagos_whitelist=("add",)))
        with pytest.raises(RuntimeError, match="replaced already"):
            other.enable()
        other.disable()
        assert is_ours("mul.Tensor") and not is_ours("add.Tensor")


@pytest.mark.parametrize("strict", [False, True])
def test_an_operator_that_cannot_be_registered(
    gems: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strict: bool
) -> None:
    """An ATen operator that this PyTorch does not have."""
    row = ("operator_of_another_pytorch", gems.FULL_CONFIG_BY_FUNC["mul"][0][1])
    monkeypatch.setitem(gems.FULL_CONFIG_BY_FUNC, "mul", [*gems.FULL_CONFIG_BY_FUNC["mul"], row])
    operators = AtenOperators(settings(flagos_whitelist=("mul",), strict=strict))
    if strict:
        with pytest.raises(RuntimeError, match=r"operator_of_another_pytorch.*strict"):
            operators.enable()
        assert not is_ours("mul.Tensor")
        return
    report = operators.enable()
    assert is_ours("mul.Tensor")
    (why,) = [why for key, _, why in report.left if key == "operator_of_another_pytorch"]
    assert why == "this PyTorch has no such operator"
    assert "operator_of_another_pytorch" in caplog.text and "the test's flagos_whitelist" in caplog.text


def test_nothing_stays_replaced_where_enabling_fails(gems: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise ArithmeticError("a broken FlagGems")

    monkeypatch.setattr(gems, "enable", fails)
    with pytest.raises(ArithmeticError):
        AtenOperators(Settings()).enable()
    monkeypatch.undo()
    with AtenOperators(settings(flagos_whitelist=("mul",))):
        assert is_ours("mul.Tensor")


@pytest.mark.parametrize(
    ("values", "device", "deterministic", "why"),
    [
        ({"use_flaggems": False}, NVIDIA, False, "USE_FLAGGEMS=0 (the test's use_flaggems)"),
        ({"flagos_whitelist": ()}, NVIDIA, False, "flagos_whitelist is empty (the test's flagos_whitelist)"),
        ({"flagos_faster": ()}, NVIDIA, False, "flagos_faster is empty (the test's flagos_faster)"),
        (
            {"flagos_faster": ("mul",), "flagos_broken": ("mul",)},
            NVIDIA,
            False,
            "flagos_faster names only excluded functions (the test's flagos_faster)",
        ),
        ({"flagos_faster": (), "prefer": "flagos"}, NVIDIA, False, None),
        ({}, NVIDIA, True, "deterministic mode"),
        ({}, CPU, False, "FlagGems does not support cpu"),
        ({}, NVIDIA, False, None),
    ],
)
def test_when_it_is_off(values: dict[str, Any], device: Device, deterministic: bool, why: str | None) -> None:
    assert why_off(settings(**values), device, deterministic=deterministic) == why
    if why is not None:
        report = replace_operators(settings(**values), device, deterministic=deterministic)
        assert report == AtenReport(off=why) and why in report.summary()


def test_the_second_model_of_a_process_finds_it_on(gems: ModuleType) -> None:
    wanted = settings(flagos_whitelist=("mul",))
    assert replace_operators(wanted, NVIDIA) is replace_operators(wanted, NVIDIA)
    restore_operators()
    assert not is_ours("mul.Tensor")


@pytest.mark.parametrize("strict", [False, True])
def test_a_flaggems_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strict: bool) -> None:
    def fails() -> ModuleType:
        raise RuntimeError("No device were detected")

    monkeypatch.setattr(aten.operators, "load", fails)
    if strict:
        with pytest.raises(RuntimeError, match="No device"):
            replace_operators(settings(strict=True), NVIDIA)
        return
    report = replace_operators(Settings(), NVIDIA)
    assert report.off == "FlagGems could not be switched on: RuntimeError: No device were detected"
    assert "No device were detected" in caplog.text


@pytest.mark.parametrize("name", ["USE_FLAGGEMS", "SGLANG_FL_FLAGOS_WHITELIST"])
def test_flaggems_is_not_imported_where_it_is_not_wanted(name: str) -> None:
    """Not for ATen operators, and not to find out that it has nothing for a CPU."""
    code = (
        "import sys, torch; from sglang_fl.aten import replace_operators; from sglang_fl.config import Settings; "
        "from sglang_fl.device import Device; from sglang_fl.dispatch import OpManager, SelectionPolicy; "
        f"values = {{'use_flaggems': False}} if {name!r} == 'USE_FLAGGEMS' else {{'flagos_whitelist': ()}}; "
        "print(replace_operators(Settings(**values), Device('nvidia', 'cuda', 'cuda', '')).off); "
        "plan = OpManager().plan('rms_norm', SelectionPolicy('flagos')); print(dict(plan.passed_over)['default.flagos']); "
        "print([m for m in sys.modules if m.startswith('flag_gems')])"
    )
    environ = {**os.environ, "USE_FLAGGEMS": "0"} if name == "USE_FLAGGEMS" else dict(os.environ)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ).stdout.splitlines()
    assert printed[2] == "[]"
    assert printed[1] == "FlagGems does not support cpu"


def mul(x: int, y: int) -> int:
    return x * y


@pytest.mark.parametrize("once", [True, False])
def test_record(tmp_path: Path, once: bool) -> None:
    log = tmp_path / "operators.log"
    recorder = Recorder(settings(flaggems_record=True, flaggems_log_once=once, flaggems_log_path=str(log)))
    tensor, scalar = recorder.recording("mul.Tensor", mul), recorder.recording("mul.Scalar", mul)
    assert [tensor(2, 3), tensor(4, 5), scalar(6, y=7)] == [6, 20, 42]
    line = f"[DEBUG] {mul.__module__}.mul: aten::mul"
    lines = [f"{line}.Tensor", f"{line}.Tensor", f"{line}.Scalar"]
    assert log.read_text().splitlines() == (lines[1:] if once else lines)


def test_record_without_a_file_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recorded = Recorder(settings(flaggems_record=True)).recording("mul.Tensor", mul)
    recorded(1, 2)
    assert f"{mul.__module__}.mul: aten::mul.Tensor" in caplog.text


def test_record_to_a_file_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded = Recorder(settings(flaggems_record=True, flaggems_log_once=False, flaggems_log_path=str(tmp_path))).recording("mm", mul)
    assert [recorded(1, 2), recorded(3, 4)] == [2, 12]
    assert caplog.text.count("cannot be written") == 1


def test_recorded_operators_are_replaced_all_the_same(gems: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "operators.log"
    values = {"flagos_whitelist": ("mul",), "flaggems_record": True, "flaggems_log_path": str(log)}
    with AtenOperators(settings(**values)) as report:
        assert is_ours("mul.Tensor") and dict(report.replaced)["mul.Tensor"] == "mul"
    assert not log.exists(), "a registration is no call"


def test_nothing_stays_replaced_where_the_report_fails(gems: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FlagGems that lacks what the report asks: what the log then says must be true."""
    monkeypatch.delattr(gems, "vendor_name")
    monkeypatch.setattr(aten.operators, "_exclusion_reason", lambda gems, *_: gems.vendor_name)
    report = replace_operators(settings(flagos_blacklist=("mul",)), NVIDIA)
    assert report.off is not None and "vendor_name" in report.off
    assert not is_ours("add.Tensor")


@pytest.mark.parametrize(
    ("off", "deterministic"), [({"use_flaggems": False}, False), ({"flagos_whitelist": ()}, False), ({"flagos_whitelist": ("mul",)}, True)]
)
def test_what_was_on_is_off_where_the_settings_ask_for_nothing(gems: ModuleType, off: dict[str, Any], deterministic: bool) -> None:
    replace_operators(settings(flagos_whitelist=("mul",)), NVIDIA)
    assert is_ours("mul.Tensor")
    assert "no ATen operator is replaced" in replace_operators(settings(**off), NVIDIA, deterministic=deterministic).summary()
    assert not is_ours("mul.Tensor")


@pytest.mark.parametrize("strict", [False, True])
def test_an_operator_of_the_whitelist_that_flaggems_leaves_out(
    gems: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strict: bool
) -> None:
    key, function, *_ = gems.FULL_CONFIG_BY_FUNC["to_copy"][0]
    monkeypatch.setitem(gems.FULL_CONFIG_BY_FUNC, "to_copy", [(key, function, lambda: False)])
    operators = AtenOperators(settings(flagos_whitelist=("to_copy", "mul"), strict=strict))
    if strict:
        with pytest.raises(RuntimeError, match="does not register it with this PyTorch"):
            operators.enable()
        return
    assert {function for _, function in operators.enable().replaced} == {"mul"}
    assert "aten::_to_copy: FlagGems does not register it with this PyTorch; PyTorch's own kernel is used" in caplog.text


@pytest.mark.parametrize("strict", [False, True])
def test_a_registration_that_fails(
    gems: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strict: bool
) -> None:
    impl = torch.library.Library.impl

    def fails(self: Any, key: str, *args: Any, **kwargs: Any) -> None:
        if key == "mm":
            raise ArithmeticError("no room for it")
        impl(self, key, *args, **kwargs)

    monkeypatch.setattr(torch.library.Library, "impl", fails)
    if strict:
        with pytest.raises(RuntimeError, match="no room for it"):
            AtenOperators(settings(strict=True)).enable()
        return
    with AtenOperators(Settings()):
        assert "aten::mm: it could not be registered: no room for it; PyTorch's own kernel is used" in caplog.text


def test_after_a_failure_the_next_enabling_begins_anew(gems: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = AtenOperators(settings(flagos_whitelist=("mul", "mm")))
    with monkeypatch.context() as patch:
        patch.setattr(AtenOperators, "_check_left", lambda self, left, failed: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            operators.enable()
    assert not is_ours("mul.Tensor")
    with operators as report:
        assert is_ours("mul.Tensor") and {function for _, function in report.replaced} == {"mul", "mm"}
        assert all("could not be registered" not in why for _, _, why in report.left)


def test_other_settings_take_the_place_of_those_before(gems: ModuleType) -> None:
    for function, other in (("mul", "mm"), ("mm", "mul")):
        report = replace_operators(settings(flagos_whitelist=(function,)), NVIDIA)
        assert {name for _, name in report.replaced} == {function} != {other}


def test_another_set_that_is_on_is_not_reported_as_off(gems: ModuleType) -> None:
    with AtenOperators(settings(flagos_whitelist=("mul",))), pytest.raises(RuntimeError, match="replaced already"):
        replace_operators(settings(flagos_whitelist=("mm",)), NVIDIA)


@pytest.mark.parametrize("strict", [False, True])
def test_flaggems_that_is_asked_for_and_not_installed(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    monkeypatch.setattr(aten.layer, "why_not_here", lambda _: NOT_INSTALLED)
    wanted = settings(flagos_whitelist=("mul",), strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match="FlagGems is not installed"):
            replace_operators(wanted, NVIDIA)
    else:
        assert replace_operators(wanted, NVIDIA).off == NOT_INSTALLED
    assert replace_operators(Settings(strict=strict), NVIDIA).off == NOT_INSTALLED, "nobody asked for it"


def test_a_record_is_not_less_than_the_level_of_the_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(aten.recorder.logger, "level", logging.NOTSET)
    monkeypatch.setattr(logging.getLogger("sglang_fl"), "level", logging.ERROR)
    aten.recorder.logger.manager._clear_cache()  # type: ignore[attr-defined]
    Recorder(settings(flaggems_record=True)).recording("mm", mul)(1, 2)
    assert "aten::mm" in caplog.text
    aten.recorder.logger.setLevel(logging.NOTSET)


def test_a_path_for_a_record_that_is_off(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    replace_operators(settings(flaggems_log_path=str(tmp_path / "a.log")), CPU)
    assert "SGLANG_FLAGGEMS_RECORD is not" in caplog.text


def test_another_way_to_capture_graphs_is_no_scope(gems: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.graph_problems() == ()
    monkeypatch.setattr(scope, "graph_problems", lambda: ("resolve_decode_backend is missing",))
    assert "resolve_decode_backend is missing" in str(replace_operators(in_graphs(), NVIDIA, captures_graphs=True).off)
    assert not is_ours("mul.Tensor")
