# SPDX-License-Identifier: Apache-2.0
import fnmatch
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from sglang_fl.device import VENDORS, Device, Vendor, detect, drivers, probe, vendor_problems


def fake_torch(
    card: str | None = None, *, hip: str | None = None, musa: str | None = None, has: tuple[str, ...] = (), idle: tuple[str, ...] = ()
) -> ModuleType:
    """A PyTorch with a CUDA-like card if ``card`` is given, the modules of ``has``, and of ``idle`` without a device."""
    modules: dict[str, Any] = {"xpu": SimpleNamespace(is_available=lambda: False), "mps": SimpleNamespace(is_available=lambda: False)}
    modules |= {name: SimpleNamespace(is_available=lambda: True) for name in has}
    modules |= {name: SimpleNamespace(is_available=lambda: False) for name in idle}
    version = SimpleNamespace(hip=hip)
    if musa is not None:
        version.musa = musa
    cuda = SimpleNamespace(is_available=lambda: card is not None, get_device_name=lambda: card)
    return cast(ModuleType, SimpleNamespace(cuda=cuda, version=version, **modules))


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The commands that PATH has: none, until a test adds some."""
    commands: set[str] = set()
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name in commands else None)
    return commands


@pytest.fixture
def device_files(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What there is under /dev: nothing, until a test adds something."""
    files: set[str] = set()
    monkeypatch.setattr("glob.glob", lambda pattern: fnmatch.filter(files, pattern))
    return files


@pytest.fixture(autouse=True)
def torch_builds(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What the installed PyTorch is built for on this Linux machine: CUDA and ROCm, until a test says otherwise."""
    builds = {"cuda", "hip"}
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr("sglang_fl.device.evidence.torch_builds", lambda: frozenset(builds))
    return builds


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The chips' Python modules that are installed: each one's extension of PyTorch, and no torchada, until a test says otherwise."""
    modules = {row.torch_extension for row in VENDORS.values() if row.torch_extension}
    asked_for = modules | {row.in_tree_needs for row in VENDORS.values() if row.in_tree_needs}
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        return (SimpleNamespace() if name in modules else None) if name in asked_for else find_spec(name, package)

    monkeypatch.setattr("importlib.util.find_spec", find)
    return modules


@pytest.mark.parametrize(
    ("torch", "vendor", "device_type", "in_tree"),
    [
        (fake_torch(), "cpu", "cpu", None),
        (fake_torch("NVIDIA H100 80GB HBM3"), "nvidia", "cuda", "cuda"),
        (fake_torch("Tesla V100-SXM2-16GB"), "nvidia", "cuda", "cuda"),
        (fake_torch("GeForce RTX 4090"), "nvidia", "cuda", "cuda"),
        (fake_torch("a card of no name"), "nvidia", "cuda", "cuda"),
        (fake_torch("NVIDIA H100 80GB HBM3", has=("xpu", "mps")), "nvidia", "cuda", "cuda"),
        (fake_torch("AMD Instinct MI300X", hip="6.2"), "amd", "cuda", "rocm"),
        (fake_torch("a card of no name", hip="6.2"), "amd", "cuda", "rocm"),
        (fake_torch("P800 OAM", hip="6.2"), "amd", "cuda", "rocm"),
        (fake_torch("BW200"), "nvidia", "cuda", "cuda"),
        (fake_torch("K100_AI", hip="5.7"), "hygon", "cuda", None),
        (fake_torch("BW200", hip="5.7"), "hygon", "cuda", None),
        (fake_torch("Hygon DCU Z100", hip="5.7"), "hygon", "cuda", None),
        (fake_torch("MetaX C500"), "metax", "cuda", None),
        (fake_torch("Iluvatar BI-V150"), "iluvatar", "cuda", None),
        (fake_torch("BI-V150", has=("corex",)), "iluvatar", "cuda", None),
        (fake_torch("P800 OAM"), "kunlunxin", "cuda", None),
        (fake_torch("ZW810E"), "thead", "cuda", "sail"),
        (fake_torch("PPU-ZW810"), "thead", "cuda", "sail"),
        (fake_torch(has=("npu",)), "ascend", "npu", "npu"),
        (fake_torch("a card", hip="6.2", has=("npu",)), "ascend", "npu", "npu"),
        (fake_torch("NVIDIA H100", has=("npu",)), "nvidia", "cuda", "cuda"),
        (fake_torch(has=("npu", "xpu")), "ascend", "npu", "npu"),
        (fake_torch(idle=("npu",)), "cpu", "cpu", None),
        (fake_torch(has=("xpu", "mps")), "intel", "xpu", "xpu"),
        (fake_torch(has=("mps",)), "apple", "mps", "mps"),
        (fake_torch(has=("mlu",)), "cambricon", "mlu", None),
        (fake_torch(has=("gcu",)), "enflame", "gcu", None),
        (fake_torch(has=("txda",)), "tsingmicro", "txda", None),
        (fake_torch(has=("ptpu",)), "sunrise", "ptpu", None),
        (fake_torch(has=("aipu",)), "aipu", "aipu", None),
        (fake_torch(has=("mps", "mlu")), "apple", "mps", "mps"),
        (fake_torch(idle=("mlu", "gcu")), "cpu", "cpu", None),
    ],
)
@pytest.mark.usefixtures("on_path")
def test_detect(torch: ModuleType, vendor: str, device_type: str, in_tree: str | None) -> None:
    device = detect(torch, {})
    assert (device.vendor, device.device_type, device.in_tree) == (vendor, device_type, in_tree)
    assert device.is_in_tree == (in_tree is not None)
    assert device.evidence


@pytest.mark.parametrize(
    ("hip", "command", "vendor"),
    [
        (None, "mx-smi", "metax"),
        (None, "ixsmi", "iluvatar"),
        (None, "xpu-smi", "kunlunxin"),
        (None, "xpu_smi", "kunlunxin"),
        (None, "hy-smi", "nvidia"),
        ("5.7", "hy-smi", "hygon"),
        ("5.7", "mx-smi", "amd"),
    ],
)
def test_detect_of_a_card_that_does_not_say_whose_it_is(on_path: set[str], hip: str | None, command: str, vendor: str) -> None:
    on_path.add(command)
    device = detect(fake_torch("Device 4000", hip=hip), {})
    assert device.vendor == vendor
    assert (command in device.evidence) == (vendor not in ("nvidia", "amd"))


def test_a_card_that_says_whose_it_is_counts_more_than_commands(on_path: set[str]) -> None:
    on_path |= {"mx-smi", "ixsmi", "xpu-smi"}
    assert detect(fake_torch("NVIDIA A100"), {}).vendor == "nvidia"
    on_path |= {"hy-smi"}
    assert detect(fake_torch("AMD Instinct MI300X", hip="6.2"), {}).vendor == "amd"


@pytest.mark.parametrize(
    ("forced", "vendor"),
    [("metax", "metax"), ("MetaX ", "metax"), ("iluvatar", "iluvatar"), ("ascend", "nvidia"), ("unheard-of", "nvidia"), ("", "nvidia")],
)
@pytest.mark.usefixtures("on_path")
def test_gems_vendor_decides_between_cards_alike(forced: str, vendor: str) -> None:
    device = detect(fake_torch("NVIDIA-like card"), {"GEMS_VENDOR": forced})
    assert device.vendor == vendor
    assert (device.evidence == "GEMS_VENDOR") == (vendor != "nvidia")


def test_gems_vendor_is_no_device() -> None:
    assert detect(fake_torch(), {"GEMS_VENDOR": "metax"}).vendor == "cpu"


def test_musa_is_in_tree_with_torchada_only(installed: set[str]) -> None:
    torch = fake_torch(musa="4.2", has=("musa",))
    without = detect(torch, {})
    assert (without.vendor, without.device_type, without.in_tree) == ("mthreads", "musa", None)
    assert "torchada" in without.evidence
    installed.add("torchada")
    assert detect(torch, {}).in_tree == "musa"


def test_musa_build_without_a_device_is_plain_cpu() -> None:
    assert detect(fake_torch(musa="4.2", idle=("musa",)), {}).vendor == "cpu"


@pytest.mark.parametrize(("value", "in_tree"), [("1", "cpu"), ("0", "cuda")])
@pytest.mark.usefixtures("on_path")
def test_cpu_engine_of_sglang_goes_before_everything(device_files: set[str], value: str, in_tree: str) -> None:
    device_files.add("/dev/nvidia0")
    for device in (detect(fake_torch("NVIDIA H100"), {"SGLANG_USE_CPU_ENGINE": value}), probe({"SGLANG_USE_CPU_ENGINE": value})):
        assert device.in_tree == in_tree


@pytest.mark.parametrize(
    ("files", "vendor"),
    [
        ((), "cpu"),
        (("/dev/nvidia0", "/dev/nvidiactl"), "nvidia"),
        (("/dev/nvidia12",), "nvidia"),
        (("/dev/nvidiactl", "/dev/nvidia-uvm"), "cpu"),
        (("/dev/kfd",), "amd"),
        (("/dev/davinci3", "/dev/davinci_manager"), "ascend"),
        (("/dev/davinci_manager",), "cpu"),
        (("/dev/mtgpu.0",), "mthreads"),
        (("/dev/alixpu0", "/dev/alixpu_ctl"), "thead"),
        (("/dev/mxcd",), "metax"),
        (("/dev/iluvatar0",), "iluvatar"),
        (("/dev/xpuctrl",), "kunlunxin"),
        (("/dev/cambricon_dev0",), "cambricon"),
        (("/dev/gcu0",), "enflame"),
        (("/dev/aipu",), "aipu"),
        (("/dev/nvidia0", "/dev/mxcd"), "metax"),
        (("/dev/nvidia0", "/dev/iluvatar0"), "iluvatar"),
    ],
)
@pytest.mark.usefixtures("on_path")
def test_probe_by_device_files(device_files: set[str], installed: set[str], files: tuple[str, ...], vendor: str) -> None:
    device_files.update(files)
    installed.add("torchada")
    row = VENDORS[vendor]
    assert probe({}) == Device(vendor, row.device_type, row.in_tree, probe({}).evidence)


def test_probe_takes_device_files_for_more_than_a_tool(on_path: set[str], device_files: set[str]) -> None:
    """Images come with nvidia-smi or npu-smi, and Intel has an xpu-smi, too."""
    on_path |= {command for vendor in VENDORS.values() if vendor.device_files for command in vendor.commands}
    device_files.add("/dev/davinci0")
    assert probe({}).vendor == "ascend"


@pytest.mark.parametrize("vendor", [vendor for vendor in VENDORS.values() if vendor.commands], ids=lambda vendor: vendor.name)
@pytest.mark.usefixtures("device_files")
def test_probe_by_any_command(on_path: set[str], vendor: Vendor) -> None:
    """WSL2 has nvidia-smi and no /dev/nvidia0."""
    on_path.add(vendor.commands[-1])
    device = probe({})
    assert (device.vendor, f"{vendor.commands[-1]} on PATH" in device.evidence) == (vendor.name, True)


@pytest.mark.parametrize(
    ("command", "files", "vendor"),
    [("hy-smi", ("/dev/kfd",), "hygon"), ("tsm_smi", (), "tsingmicro"), ("pt_smi", (), "sunrise")],
)
def test_probe_by_command_where_a_driver_has_no_file_of_its_own(
    on_path: set[str], device_files: set[str], command: str, files: tuple[str, ...], vendor: str
) -> None:
    on_path.add(command)
    device_files.update(files)
    assert probe({}).vendor == vendor


@pytest.mark.parametrize(
    ("forced", "command", "files", "vendor"),
    [
        ("hygon", "hy-smi", ("/dev/kfd",), "hygon"),
        ("metax", "mx-smi", ("/dev/nvidia0",), "metax"),
        ("cuda", "", ("/dev/nvidia0", "/dev/mxcd"), "nvidia"),
        ("metax", "", ("/dev/nvidia0",), "metax"),
        ("amd", "", ("/dev/nvidia0",), "nvidia"),
        ("ascend", "npu-smi", ("/dev/nvidia0",), "nvidia"),
        ("metax", "", (), "cpu"),
        ("unheard-of", "", ("/dev/nvidia0",), "nvidia"),
    ],
)
def test_probe_with_gems_vendor(
    on_path: set[str], device_files: set[str], forced: str, command: str, files: tuple[str, ...], vendor: str
) -> None:
    on_path.add(command)
    device_files.update(files)
    assert probe({"GEMS_VENDOR": forced}).vendor == vendor


def test_probe_imports_nothing() -> None:
    code = "import sys; from sglang_fl.device import probe; probe(); sys.exit(bool({'torch', 'sglang', 'flag_gems'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_every_vendor_can_be_found_without_torch() -> None:
    for vendor in VENDORS.values():
        assert vendor.name == "cpu" or vendor.device_files or vendor.commands or vendor.pci_vendor or vendor.machine, vendor.name


@pytest.fixture
def display_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_path: set[str]) -> Path:
    """The PCI vendor id of the machine's only display device: Intel's, until a test writes another."""
    file = tmp_path / "vendor"
    file.write_text("0x8086\n")
    monkeypatch.setattr("glob.glob", lambda pattern: [str(file)] if pattern == "/sys/class/drm/renderD*/device/vendor" else [])
    return file


def test_probe_finds_an_intel_gpu_if_torch_is_built_for_it(display_device: Path, torch_builds: set[str]) -> None:
    """Most computers with an Intel CPU have such a device, and nearly none a PyTorch for it."""
    assert probe({}).vendor == "cpu" and "PyTorch is not built for xpu" in probe({}).evidence
    torch_builds.add("xpu")
    assert (probe({}).vendor, probe({}).in_tree) == ("intel", "xpu") and str(display_device) in probe({}).evidence
    display_device.write_text("0x1002\n")
    assert probe({}).vendor == "cpu"


@pytest.mark.parametrize(("machine", "vendor"), [("arm64", "apple"), ("x86_64", "cpu")])
@pytest.mark.usefixtures("on_path", "device_files")
def test_probe_finds_apple_silicon(monkeypatch: pytest.MonkeyPatch, machine: str, vendor: str) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert probe({}).vendor == vendor


@pytest.mark.parametrize(
    ("builds", "files", "vendor"),
    [
        (("cuda",), ("/dev/nvidia0", "/dev/kfd"), "nvidia"),
        (("hip",), ("/dev/nvidia0", "/dev/kfd"), "amd"),
        ((), ("/dev/nvidia0", "/dev/kfd"), "cpu"),
        ((), ("/dev/nvidia0", "/dev/davinci0"), "ascend"),
        (("cuda",), ("/dev/nvidia0", "/dev/davinci0"), "nvidia"),
        (("cuda",), ("/dev/nvidia0", "/dev/cambricon_dev0"), "nvidia"),
    ],
)
@pytest.mark.usefixtures("on_path")
def test_probe_sees_what_torch_is_built_for(
    device_files: set[str], torch_builds: set[str], builds: tuple[str, ...], files: tuple[str, ...], vendor: str
) -> None:
    device_files.update(files)
    torch_builds.clear()
    torch_builds.update(builds)
    device = probe({})
    assert device.vendor == vendor
    if vendor == "cpu":
        assert "NVIDIA GPU (device file /dev/nvidia[0-9]*): PyTorch is not built for cuda" in device.evidence


@pytest.mark.parametrize(("value", "vendor"), [("", "cpu"), ("-1", "cpu"), ("0", "nvidia"), ("1,2", "nvidia")])
@pytest.mark.usefixtures("on_path")
def test_probe_of_hidden_devices(device_files: set[str], value: str, vendor: str) -> None:
    device_files.add("/dev/nvidia0")
    assert probe({"CUDA_VISIBLE_DEVICES": value}).vendor == vendor


@pytest.mark.usefixtures("on_path")
def test_probe_knows_of_torchada_what_detect_knows(device_files: set[str], installed: set[str]) -> None:
    device_files.add("/dev/mtgpu.0")
    for in_tree in (None, "musa"):
        installed |= {"torchada"} if in_tree else set()
        with_torch, without = detect(fake_torch(musa="4.2", has=("musa",)), {}), probe({})
        assert (with_torch.vendor, with_torch.in_tree) == (without.vendor, without.in_tree) == ("mthreads", in_tree)


@pytest.mark.parametrize("vendor", [row for row in VENDORS.values() if row.torch_extension], ids=lambda row: row.name)
def test_probe_takes_no_chip_whose_extension_of_pytorch_is_missing(on_path: set[str], installed: set[str], vendor: Vendor) -> None:
    """A container image may hold the driver's tool, and another one's PyTorch."""
    on_path |= set(vendor.commands)
    assert probe({}).vendor == vendor.name
    installed.remove(vendor.torch_extension)
    device = probe({})
    assert device.vendor == "cpu" and f"{vendor.torch_extension} is not installed" in device.evidence


@pytest.mark.parametrize("forced", VENDORS)
@pytest.mark.parametrize(
    ("torch", "file"),
    [
        (fake_torch("a card"), "/dev/nvidia0"),
        (fake_torch("MetaX C500"), "/dev/mxcd"),
        (fake_torch("a card", hip="6.2"), "/dev/kfd"),
        (fake_torch(has=("npu",)), "/dev/davinci0"),
        (fake_torch(has=("mlu",)), "/dev/cambricon_dev0"),
        (fake_torch(), "/dev/null"),
    ],
)
@pytest.mark.usefixtures("on_path")
def test_gems_vendor_is_in_force_or_a_problem_and_means_the_same_to_both(
    device_files: set[str], torch_builds: set[str], torch: ModuleType, file: str, forced: str
) -> None:
    device_files.add(file)
    torch_builds.clear()
    torch_builds.add("cuda" if torch.version.hip is None else "hip")
    environ = {"GEMS_VENDOR": forced}
    device = detect(torch, environ)
    assert probe(environ).vendor == device.vendor
    problems = vendor_problems(environ, device)
    assert bool(problems) == (device.vendor != forced)
    assert all(forced in problem and device.vendor in problem and device.evidence in problem for problem in problems)


def test_what_torch_is_built_for_is_read_from_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    assert drivers.torch_builds() == {name for name in ("cuda", "hip", "xpu") if getattr(torch.version, name, None) is not None}
    version = tmp_path / "version.py"
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert drivers.torch_builds() == {"cuda", "hip"}, "there is no such file"
    for text, builds in (
        ("__version__ = '2.9.0+xpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = '20250101'\n", {"xpu"}),
        ("cuda = None\nhip = '6.2.41133'\n", {"hip"}),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", set()),
    ):
        version.write_text(text)
        assert drivers.torch_builds() == builds
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert drivers.torch_builds() == {"cuda", "hip"}, "there is no PyTorch"
