# SPDX-License-Identifier: Apache-2.0
"""PlatformFL: our choice against SGLang's own order of detection, and what it answers on this machine."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import platforms
from sglang.srt.platforms.cuda import CudaSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum

from sglang_fl import activate_platform
from sglang_fl.compat import TESTED, installed_version
from sglang_fl.device import VENDORS, Device, detect
from sglang_fl.platform import PlatformFL, plain_cpu, platform_class
from sglang_fl.platform.hooks import PlatformHooks
from sglang_fl.platform.out_of_tree import OutOfTree

ON, OFF = SimpleNamespace(is_available=lambda: True), SimpleNamespace(is_available=lambda: False)


def fake_torch(
    *, cuda: str | None = None, hip: str | None = None, npu: bool = False, xpu: bool = False, musa: bool = False, mps: bool = False
) -> Any:
    """A torch as far as detection looks at it; ``cuda`` is the card's name."""
    fake = ModuleType("torch")
    fake.cuda = SimpleNamespace(is_available=lambda: cuda is not None, get_device_name=lambda *_: cuda)
    fake.version = SimpleNamespace(hip=hip, cuda=None if hip or not cuda else "13.0", musa="4.0" if musa else None)
    fake.xpu = ON if xpu else OFF
    fake.mps = ON if mps else OFF
    if npu:
        fake.npu = ON
    if musa:
        fake.musa = ON
    return fake


H100, MI300 = "NVIDIA H100 80GB HBM3", "AMD Instinct MI300X"
#: What the machine has, and the platform that SGLang's own detection takes for it.
MACHINES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "nothing": ({}, {}),
    "an NVIDIA GPU": ({"cuda": H100}, {}),
    "an old NVIDIA GPU": ({"cuda": "Tesla V100-SXM2-32GB"}, {}),
    "a GeForce": ({"cuda": "GeForce RTX 2080 Ti"}, {}),
    "a T-Head card": ({"cuda": "ZW810E"}, {}),
    "an AMD GPU": ({"cuda": MI300, "hip": "6.4"}, {}),
    "an NPU": ({"npu": True}, {}),
    "an XPU": ({"xpu": True}, {}),
    "a MUSA GPU": ({"musa": True}, {}),
    "an Apple GPU": ({"mps": True}, {}),
    "NVIDIA and NPU": ({"cuda": H100, "npu": True}, {}),
    "AMD and NPU": ({"cuda": MI300, "hip": "6.4", "npu": True}, {}),
    "NVIDIA and XPU": ({"cuda": H100, "xpu": True}, {}),
    "NPU and XPU": ({"npu": True, "xpu": True}, {}),
    "XPU and MUSA": ({"xpu": True, "musa": True}, {}),
    "NVIDIA, CPU engine": ({"cuda": H100}, {"SGLANG_USE_CPU_ENGINE": "1"}),
    "nothing, CPU engine": ({}, {"SGLANG_USE_CPU_ENGINE": "1"}),
    "NPU, CPU engine": ({"npu": True}, {"SGLANG_USE_CPU_ENGINE": "1"}),
    "NVIDIA, CPU engine off": ({"cuda": H100}, {"SGLANG_USE_CPU_ENGINE": "0"}),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_our_choice_is_sglangs(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, environ = MACHINES[machine]
    torch_there = fake_torch(**devices)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platforms, "torch", torch_there)
    monkeypatch.setattr(platforms, "load_plugins_by_group", lambda group: {})
    monkeypatch.setitem(sys.modules, "torchada", ModuleType("torchada"))
    monkeypatch.setattr("sglang_fl.device.evidence.importlib.util.find_spec", lambda name: object())

    theirs = platforms._resolve_platform()
    device = detect(torch_there, os.environ)
    ours = platform_class(device)()
    if type(theirs) is platforms.SRTPlatform:  # SGLang has found nothing; a CPU serves there
        assert device.vendor == "cpu" and ours.is_out_of_tree()
        return
    assert isinstance(ours, type(theirs))
    assert not ours.is_out_of_tree()
    for name in ("_enum", "device_name", "device_type", "capabilities"):
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    ("card", "hip", "vendor"),
    [
        ("MetaX C500", None, "metax"),
        ("Iluvatar BI-V150", None, "iluvatar"),
        ("Kunlun P800", None, "kunlunxin"),
        ("Hygon K100_AI", "6.1", "hygon"),
        ("BW1000", "6.1", "hygon"),
    ],
)
def test_chips_that_imitate_cuda_are_out_of_tree(card: str, hip: str | None, vendor: str) -> None:
    device = detect(fake_torch(cuda=card, hip=hip), {})
    assert (device.vendor, device.in_tree) == (vendor, None)
    platform = platform_class(device)()
    assert platform.is_out_of_tree() and not platform.is_cuda() and not platform.is_cuda_alike()
    assert (platform.device_type, platform.device_name) == ("cuda", vendor)
    assert not isinstance(platform, CudaSRTPlatform)
    assert platform.capabilities.graph_capture and not platform.capabilities.supports_pynccl


def test_gems_vendor_decides_between_lookalikes() -> None:
    assert detect(fake_torch(cuda="Device 0"), {"GEMS_VENDOR": "metax"}).vendor == "metax"
    assert detect(fake_torch(cuda=H100), {}).vendor == "nvidia"


def test_musa_without_torchada_is_out_of_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_fl.device.evidence.importlib.util.find_spec", lambda name: None)
    device = detect(fake_torch(musa=True), {})
    assert (device.vendor, device.in_tree) == ("mthreads", None)


@pytest.mark.parametrize("vendor", [v for v in VENDORS.values() if v.in_tree is None and v.device_type not in ("cuda", "cpu")])
def test_devices_that_sglang_does_not_know(vendor: Any) -> None:
    fake = fake_torch()
    setattr(fake, vendor.device_type, ON)
    device = detect(fake, {})
    assert (device.vendor, device.device_type, device.in_tree) == (vendor.name, vendor.device_type, None)
    platform: Any = platform_class(device)()
    assert platform.is_out_of_tree()
    assert platform.get_device(None) == vendor.device_type
    assert platform.get_device(1) == f"{vendor.device_type}:1"
    assert platform.get_default_attention_backend() == vendor.attention


def test_device_operations_go_to_the_devices_module(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=1000, uuid="GPU-1")
    asked: list[Any] = []
    module = SimpleNamespace(
        get_device_properties=lambda i: properties,
        mem_get_info=lambda device=None: (300, 1000),
        get_device_name=lambda i: f"MLU {i}",
        get_device_capability=lambda i: (5, 0),
        device_count=lambda: 4,
        empty_cache=lambda: asked.append("empty_cache"),
        synchronize=lambda: asked.append("synchronize"),
        set_device=lambda device: asked.append(device),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    platform: Any = platform_class(Device("cambricon", "mlu", None, "test"))()
    assert platform.get_device_total_memory() == 1000
    assert platform.get_current_memory_usage() == 700.0
    assert platform.get_available_memory(0) == (300, 1000)
    assert platform.get_device_name(2) == "MLU 2"
    assert platform.get_device_uuid(0) == "GPU-1"
    assert platform.get_device_capability(0) == (5, 0)
    assert platform.device_count() == 4
    platform.empty_cache()
    platform.synchronize()
    platform.set_device("mlu:1")
    assert asked == ["empty_cache", "synchronize", "mlu:1"]
    del module.get_device_capability
    properties.uuid = None
    assert platform.get_device_capability(0) is None
    assert platform.get_device_uuid(3) == "mlu:3"
    assert platform.is_pin_memory_available() and not platform.is_pin_memory_available("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_this_machine_is_a_plain_cpu() -> None:
    platform: Any = PlatformFL()
    assert platform.is_out_of_tree() and platform._enum is PlatformEnum.OOT
    assert platform.get_device(None) == platform.get_device(1) == "cpu"
    assert platform.get_default_attention_backend() == "torch_native"
    assert platform.get_compile_backend() == "eager"
    assert platform.get_group_coordinator_device(1) == torch.device("cpu")
    assert platform.get_torch_distributed_backend_str() == "gloo"
    assert platform.get_torch_profiler_activity() is torch.profiler.ProfilerActivity.CPU
    assert platform.get_torch_profiler_activity_str() == "CPU"
    assert 0 < platform.get_current_memory_usage() < platform.get_device_total_memory()
    free, total = platform.get_available_memory()
    assert 0 < free <= total
    assert platform.get_device_capability() is None
    assert not platform.is_pin_memory_available()
    assert platform.device_count() == 1
    assert not platform.capabilities.graph_capture


def test_sglang_finds_us() -> None:
    assert type(platforms.current_platform).__name__ == "PlatformFL"
    assert isinstance(platforms.current_platform, PlatformHooks)


def test_in_tree_platforms_are_extended_with_the_hooks_only() -> None:
    """Nothing of SGLang's own class is replaced but what the hooks add to."""
    for vendor in VENDORS.values():
        if vendor.in_tree is None:
            continue
        cls = platform_class(Device(vendor.name, vendor.device_type, vendor.in_tree, "test"))
        own = {
            name
            for klass in cls.__mro__[:3]
            if klass.__module__.startswith("sglang_fl")
            for name in vars(klass)
            if not name.startswith("__")
        }
        added = {"device", "device_count"}
        assert own - added == {"apply_server_args_defaults", "post_load_model", "get_torch_distributed_backend_str"}
        assert not issubclass(cls, OutOfTree)


def test_collective_backend_by_vendor_and_by_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_fl import startup
    from sglang_fl.config import Settings

    for vendor in VENDORS.values():
        if vendor.in_tree is None:
            platform = platform_class(Device(vendor.name, vendor.device_type, None, "test"))()
            monkeypatch.setattr(startup, "_current", Settings())
            assert platform.get_torch_distributed_backend_str() == vendor.collective
            monkeypatch.setattr(startup, "_current", Settings(dist_backend="gloo"))
            assert platform.get_torch_distributed_backend_str() == "gloo"


def test_activation_imports_nothing_heavy() -> None:
    """SGLang calls it in the middle of its own import."""
    code = """
import sys, sglang.srt.platforms.interface
before = set(sys.modules)
import sglang_fl
sglang_fl.activate_platform()
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"flag_gems", "transformers", "openai", "rich", "torch_npu"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert activate_platform() == "sglang_fl.platform:PlatformFL"


def activate_beside(sglang: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Activate our platform in a process that finds another SGLang."""
    package = sglang / "sglang" / "srt" / "platforms"
    package.mkdir(parents=True)
    for directory in (sglang / "sglang", sglang / "sglang" / "srt", package):
        (directory / "__init__.py").touch()
    code = "import sglang_fl; print('activated:', sglang_fl.activate_platform())"
    environ = {**os.environ, "PYTHONPATH": str(sglang), **environ}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, cwd=sglang)


def test_an_sglang_without_our_interface_keeps_its_own_platform(tmp_path: Path) -> None:
    done = activate_beside(tmp_path)
    assert (done.returncode, done.stdout) == (0, "activated: None\n")
    assert "sglang-fl leaves everything to SGLang" in done.stderr
    assert f"The installed SGLang {installed_version()} differs" in done.stderr and f"tested: {TESTED}" in done.stderr
    assert "its platform interface: ModuleNotFoundError: No module named 'sglang.srt.platforms.interface'" in done.stderr
    if not torch.cuda.is_available():
        assert "SGLang itself has no platform for this device (cpu)" in done.stderr


def test_under_strict_an_sglang_without_our_interface_ends_the_process(tmp_path: Path) -> None:
    """SGLang would log any other error and go on without us."""
    done = activate_beside(tmp_path, SGLANG_FL_STRICT="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "sglang-fl cannot be used" in done.stderr and "sglang.srt.platforms.interface" in done.stderr


@pytest.mark.parametrize("code", ["import sglang_fl.platform", "from sglang_fl.platform import PlatformFL"])
def test_the_platform_can_be_imported_first(code: str) -> None:
    code += (
        "; import sglang_fl.platform as ours; from sglang.srt.platforms import current_platform as it; assert type(it) is ours.PlatformFL"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("ranks", "nodes", "expected"),
    [
        ((1, 1, 1), ["0,1"], None),
        ((2, 1, 1), ["0,1"], "0|1"),
        ((2, 1, 1), ["0,1,2,3"], "0,1|2,3"),
        ((4, 1, 1), ["0,1"], "0|0|1|1"),
        ((3, 1, 1), ["0,1"], "0|0|1"),
        ((2, 1, 1), ["0,1", "2,3"], None),
        ((2, 2, 1), ["0,1", "2,3"], "0|1|2|3"),
        ((1, 1, 2), ["0,1"], "0|1"),
        ((2, 1, 1, 2), ["0,1"], "0,1"),
        ((4, 1, 1, 2), ["0,1"], "0|1"),
    ],
)
def test_ranks_share_the_cores(ranks: tuple[int, ...], nodes: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("_SGLANG_FL_CPU_OMP_THREADS_BIND", "")
    monkeypatch.setattr("sglang.srt.utils.get_cpu_ids_by_node", lambda: nodes)
    tp, pp, dp, nnodes = (*ranks, 1)[:4]
    plain_cpu._share_cores(SimpleNamespace(tp_size=tp, pp_size=pp, dp_size=dp, nnodes=nnodes))
    assert os.environ.get("SGLANG_CPU_OMP_THREADS_BIND") == expected
    plain_cpu._share_cores(SimpleNamespace(tp_size=1, pp_size=1, dp_size=1, nnodes=1))
    assert os.environ.get("SGLANG_CPU_OMP_THREADS_BIND") is None, "what we set for one engine does not bind the next"


def test_cores_that_the_user_bound_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "1|0")
    plain_cpu._share_cores(SimpleNamespace(tp_size=2, pp_size=1, dp_size=1, nnodes=1))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "1|0"


def test_custom_operators_of_an_imitating_chip_are_found_by_the_dispatcher() -> None:
    """In a process of its own: what is registered with PyTorch stays."""
    code = """
import torch
from sglang.srt.utils.common import direct_register_custom_op
from sglang.srt.platforms import current_platform
from sglang_fl.platform.custom_operators import register_for
assert current_platform.is_out_of_tree()

def twice(x: torch.Tensor, out: torch.Tensor, factor: float = 2.0) -> None:
    out.copy_(x * factor)

direct_register_custom_op("twice_of_a_test", twice, ["out"])
x, out = torch.arange(3.0), torch.zeros(3)
try:
    torch.ops.sglang.twice_of_a_test(x, out)
    raise SystemExit("SGLang registers it for the CPU itself now")
except NotImplementedError:
    pass
assert "sglang::twice_of_a_test" in register_for("cpu")
torch.ops.sglang.twice_of_a_test(x, out)
assert torch.equal(out, 2 * x)
torch.ops.sglang.twice_of_a_test(x, out=out, factor=3.0)
assert torch.equal(out, 3 * x)
assert register_for("cpu") == []
"""
    subprocess.run([sys.executable, "-c", code], check=True)
