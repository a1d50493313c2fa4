# SPDX-License-Identifier: Apache-2.0
"""Kernels that SGLang calls outside of its layers: what runs in their place, by the settings and the policy, in SGLang's own code."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from installed_packages import Packages
from sglang.kernels.ops.memory import common
from sglang.srt.mem_cache import allocation

from sglang_fl.config import Settings
from sglang_fl.device import ENTRY_POINT_GROUP, Device
from sglang_fl.dispatch import OpManager, SelectionPolicy, kernel_implementations, policy_context, reset_global_policy, set_global_policy
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.dispatch.logger_manager import open_dispatch_log, read_dispatch_log
from sglang_fl.dispatch.policy import PolicyManager
from sglang_fl.kernels import places

COMMON = "sglang.kernels.ops.memory.common"
LAST = f"{COMMON}:get_last_loc_triton"
KERNEL = f"{COMMON}:get_last_loc_kernel"
HERE = Device("fastchip", "cpu", None, "a test")
PLATFORM = """
import torch
from sglang_fl.dispatch import Refusal
from sglang_fl.vendor_platform import KernelReplacement, VendorPlatform

calls = []

def called(table, requests, lengths):
    calls.append("called")
    return torch.where(lengths > 0, table[requests, lengths - 1], -1).to(lengths.dtype)

def launched(table, requests, lengths, result, count, stride, BLOCK_SIZE):
    calls.append(BLOCK_SIZE)
    result.copy_(called(table, requests, lengths))

def launched_with_grid(grid, *args):
    calls.append(grid)
    launched(*args)

def refuses(*args, **options):
    raise Refusal("not these")

def wrong(*args, **options):
    raise IndexError("no such row")

PLATFORM = VendorPlatform(name="fastchip", device_type="cpu", is_present=lambda: True, sglang_kernels={"TARGET": GIVEN})
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang's functions as they were, and nothing in their place but what the tests bring."""
    monkeypatch.setattr(kernel_implementations, "REFERENCES", {})
    PolicyManager.get_instance()._listeners.clear()
    own = {module: dict(vars(module)) for module in (common, allocation)}
    yield
    reset_global_policy()
    open_dispatch_log(None)
    places._places.hooks.clear()
    for module, names in own.items():
        vars(module).update(names)


_alive: list[Binder] = []


def bind(packages: Packages, target: str, given: str, settings: Settings | None = None, *, deterministic: bool = False) -> str:
    """Bind what an installed package declares; returns the package's module."""
    code = PLATFORM.replace("TARGET", target).replace("GIVEN", given)
    module = packages.install(code.replace("MODULE", "{module}"), {ENTRY_POINT_GROUP: "{module}:PLATFORM"})
    file = packages.directory / f"{module}.py"
    file.write_text(file.read_text().replace("{module}", module))
    settings = settings or Settings()
    manager = OpManager()
    manager.use(settings, HERE)
    manager.ensure_initialized(())
    set_global_policy(SelectionPolicy.from_settings(settings))
    _alive.append(Binder(manager))
    _alive[-1].bind_kernels(Load(settings, deterministic), HERE)
    return module


def calls(module: str) -> list[object]:
    return list(__import__(module).calls)


def last_locations() -> list[int]:
    """As SGLang's allocation asks for them, by the name that it has imported."""
    table = torch.arange(24, dtype=torch.int32).reshape(2, 12)
    found = allocation.get_last_loc_triton(table, torch.tensor([1, 0]), torch.tensor([3, 0]))
    return [int(value) for value in found]


def runs_on_sglangs() -> bool:
    """SGLang's own is a Triton kernel, which finds no driver here."""
    with pytest.raises(RuntimeError, match="driver"):
        last_locations()
    return True


def test_a_function_that_sglang_had_imported_is_called(packages: Packages, tmp_path: Path) -> None:
    open_dispatch_log(str(tmp_path / "log"))
    module = bind(packages, LAST, '"MODULE:called"')
    assert last_locations() == [14, -1] == last_locations()
    assert calls(module) == ["called", "called"]
    assert read_dispatch_log((tmp_path / "log").read_text()) == [(LAST, "vendor(vendor.fastchip)")]


def test_a_launch_without_its_grid(packages: Packages) -> None:
    module = bind(packages, KERNEL, '"MODULE:launched"')
    assert last_locations() == [14, -1]
    assert calls(module) == [256, "called"]


def test_a_launch_with_its_grid(packages: Packages) -> None:
    module = bind(packages, KERNEL, 'KernelReplacement("MODULE:launched_with_grid", takes_grid=True)')
    assert last_locations() == [14, -1]
    assert calls(module)[0] == (1,)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(op_backends=((LAST, ("sglang",)),)),
        Settings(op_backends=((LAST, ("reference", "sglang")),)),
        Settings(deny_vendors=("fastchip",)),
        Settings(oot_enabled=False),
        Settings(oot_blacklist=("get_last_loc_triton",)),
    ],
)
def test_what_leaves_an_operator_to_sglang_leaves_a_kernel(packages: Packages, settings: Settings) -> None:
    own = common.get_last_loc_triton
    bind(packages, LAST, '"MODULE:called"', settings)
    assert runs_on_sglangs()
    assert common.get_last_loc_triton is own, "nothing was put there"


def test_a_whitelist_is_of_layers(packages: Packages) -> None:
    module = bind(packages, LAST, '"MODULE:called"', Settings(oot_whitelist=("RMSNorm",)))
    assert last_locations() == [14, -1]
    assert calls(module) == ["called"]


@pytest.mark.parametrize("token", ["vendor", "vendor:fastchip", "impl:vendor.fastchip"])
def test_tokens_hold_for_it_and_a_change_is_followed(packages: Packages, token: str) -> None:
    module = bind(packages, LAST, '"MODULE:called"', Settings(op_backends=((LAST, ("sglang",)),)))
    set_global_policy(SelectionPolicy(per_op_order=((LAST, (token, "sglang")),)))
    assert last_locations() == [14, -1]
    with policy_context(SelectionPolicy(per_op_order=((LAST, ("sglang",)),))):
        assert runs_on_sglangs()
    assert last_locations() == [14, -1]
    set_global_policy(SelectionPolicy(per_op_order=((LAST, ("sglang",)),)))
    assert runs_on_sglangs()
    assert calls(module) == ["called", "called"]


def test_in_deterministic_mode_one_stays_with_sglang(packages: Packages) -> None:
    bind(packages, LAST, '"MODULE:called"', deterministic=True)
    assert runs_on_sglangs()


def test_in_deterministic_mode_one_that_is_declared_batch_invariant_runs(packages: Packages) -> None:
    module = bind(packages, LAST, 'KernelReplacement("MODULE:called", batch_invariant=True)', deterministic=True)
    assert last_locations() == [14, -1]
    assert calls(module) == ["called"]


def test_what_one_raises_names_the_kernel_and_whose_it_is(packages: Packages, caplog: pytest.LogCaptureFixture) -> None:
    bind(packages, KERNEL, '"MODULE:wrong"')
    with pytest.raises(IndexError, match="no such row") as raised:
        last_locations()
    assert raised.value.__notes__ == [f"sglang-fl: raised by vendor.fastchip for {KERNEL}"]
    assert f"{KERNEL}: vendor.fastchip raised IndexError: no such row" in caplog.messages


def test_what_one_refuses_comes_to_sglangs_own_and_its_error_says_so(packages: Packages) -> None:
    """By the default order, which ends with sglang."""
    bind(packages, LAST, '"MODULE:refuses"')
    assert _alive[-1].manager.plan(LAST).order[-2:] == ("reference", "sglang")
    with pytest.raises(RuntimeError, match="driver") as raised:
        last_locations()
    assert raised.value.__notes__ == ["sglang-fl: SGLang's own was called since vendor.fastchip: Refusal: not these"]


def test_what_cannot_be_imported_at_the_first_call_names_the_kernel(packages: Packages) -> None:
    bind(packages, LAST, '"MODULE:caled"')
    with pytest.raises(AttributeError, match="caled") as raised:
        last_locations()
    assert raised.value.__notes__ == [f"sglang-fl: raised while the function for {LAST} was imported"]


def test_one_of_another_chip_is_not_there(packages: Packages) -> None:
    bind(packages, LAST, '"MODULE:called"')
    manager = OpManager()
    manager.ensure_initialized(())
    (impl,) = manager.registry.get_implementations(LAST)
    assert impl.why_unavailable(Settings(), Device("cpu", "cpu", None, "a test")) == "this device is cpu"
