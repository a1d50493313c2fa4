# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_fl import startup
from sglang_fl.config import RESOLVED, Settings, SettingsError, get_effective_config, settings_of_parent
from sglang_fl.device import Device
from sglang_fl.dispatch import OpManager, SelectionPolicy, get_default_manager, get_policy, policy_from_config, reset_default_manager
from sglang_fl.dispatch.logger_manager import dispatch_log
from sglang_fl.dispatch.policy import PolicyManager

CPU = Device("cpu", "cpu", None, "test")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(startup, "_current", None)
    monkeypatch.setattr(PolicyManager, "_instance", PolicyManager())
    monkeypatch.setenv(RESOLVED, "")  # so that it is put back
    monkeypatch.delenv(RESOLVED)
    reset_default_manager()
    yield
    reset_default_manager()


def test_workers_get_what_the_main_process_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("prefer: vendor\n")
    monkeypatch.setenv("SGLANG_FL_CONFIG", str(config))
    resolved = startup.resolve(CPU)
    config.write_text("prefer: nonsense\n")  # edited while the server starts
    monkeypatch.setattr(startup, "_current", None)
    assert startup.settings_in_worker(CPU) == resolved
    assert get_policy().prefer == "vendor"
    assert get_effective_config()["prefer"] == "vendor"


def test_implementations_are_asked_by_the_device_that_was_handed_in() -> None:
    startup.resolve(Device("nvidia", "cuda", "cuda", "test"))
    policy = SelectionPolicy(per_op_order=(("rms_norm", ("flagos", "vendor")),))
    passed_over = dict(get_default_manager().plan("rms_norm", policy).passed_over)
    assert passed_over["vendor.ascend"] == "its operators are for ascend, and this device is nvidia"


def test_variables_of_flagos_other_plugins_are_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SGLANG_FL_LOG_DIR", "/tmp/logs")
    startup.resolve(CPU)
    (warning,) = [record.message for record in caplog.records if "SGLANG_FL_LOG_DIR" in record.message]
    assert warning.startswith("sglang-fl: SGLANG_FL_LOG_DIR has no effect in sglang-fl: SGLANG_FL_DISPATCH_LOG names a file")


def test_an_order_under_the_name_of_sglangs_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("op_backends:\n  RMSNorm: [vendor, reference]\n  TopK: [sglang]\n")
    monkeypatch.setenv("SGLANG_FL_CONFIG", str(file))
    monkeypatch.setenv("SGLANG_FL_PER_OP", "SiluAndMul=reference;topk=vendor")
    settings = startup.resolve(CPU)
    assert dict(settings.op_backends) == {"rms_norm": ("vendor", "reference"), "topk": ("vendor",), "silu_and_mul": ("reference",)}
    assert str(settings.source_of_order("rms_norm")) == f"{file}:1"
    assert get_policy().order_for("rms_norm") == policy_from_config(file).order_for("rms_norm") == ("vendor", "reference")
    assert SelectionPolicy(per_op_order={"RMSNorm": "reference"}).order_for("rms_norm") == ("reference",)  # type: ignore[arg-type]
    monkeypatch.setenv("SGLANG_FL_PER_OP", "RMSNorm=vendor;rms_norm=reference")
    with pytest.raises(SettingsError, match="'RMSNorm' and 'rms_norm' mean the same operator; give one of them"):
        startup.resolve(CPU)


def test_a_process_with_other_variables_is_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_FL_PREFER", "vendor")
    startup.resolve(CPU)
    assert settings_of_parent() is not None
    monkeypatch.setenv("SGLANG_FL_PREFER", "reference")
    assert settings_of_parent() is None
    assert get_effective_config()["prefer"] == "reference"


def test_each_server_of_a_process_has_its_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for prefer in ("vendor", "reference"):
        monkeypatch.setenv("SGLANG_FL_PREFER", prefer)
        startup.resolve(CPU)
        seen.append((get_policy().prefer, startup.settings_in_worker(CPU).prefer))
    assert seen == [("vendor", "vendor"), ("reference", "reference")]


def test_nothing_is_put_in_force_by_a_setting_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_FL_PREFER", "vendr")
    with pytest.raises(SettingsError, match="vendr"):
        startup.resolve(CPU)
    assert RESOLVED not in os.environ and startup._current is None


def test_a_process_without_a_parent_resolves_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_FL_PREFER", "vendor")
    assert startup.settings_in_worker(CPU).prefer == "vendor"


def test_a_vendor_that_does_not_apply_here_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together with what else is wrong, in one error."""
    monkeypatch.setenv("GEMS_VENDOR", "ascend")
    monkeypatch.setenv("SGLANG_FL_STRICT", "2")
    with pytest.raises(SettingsError) as caught:
        startup.resolve(CPU)
    strict, vendor = caught.value.problems
    assert strict.startswith("SGLANG_FL_STRICT: expected a boolean, found '2'") and vendor.startswith("GEMS_VENDOR: ascend")


def test_every_file_that_the_settings_name_is_looked_at(tmp_path: Path) -> None:
    environ = {
        "SGLANG_FL_DISPATCH_LOG": str(tmp_path),
        "SGLANG_FLAGGEMS_LOG_PATH": str(tmp_path / "none" / "a.log"),
        "FLAGCX_PATH": str(tmp_path / "flagcx"),
    }
    with pytest.raises(SettingsError) as caught:
        startup.check_settings(environ, CPU, OpManager())
    assert [problem.partition(":")[0] for problem in caught.value.problems] == list(environ)


def test_settings_that_a_bound_layer_refuses_change_nothing(tmp_path: Path) -> None:
    class Layer:
        def refresh(self) -> None:
            if PolicyManager.get_instance().get_global_policy().strict:
                raise RuntimeError("cannot follow")

    layer = Layer()
    before = Settings(prefer="reference")
    startup.apply(before, CPU)
    PolicyManager.get_instance().subscribe(layer.refresh)
    with pytest.raises(RuntimeError, match="cannot follow"):
        startup.apply(Settings(prefer="vendor", strict=True, use_flaggems=False, dispatch_log=str(tmp_path / "log")), CPU)
    assert get_policy().prefer == "reference" and startup.settings_in_worker(CPU) is before
    assert get_default_manager().given == (before, CPU) and dispatch_log().path is None
