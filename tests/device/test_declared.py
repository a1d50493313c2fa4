# SPDX-License-Identifier: Apache-2.0
"""Chips that installed packages bring up: what a declaration may say, who wins, and what PlatformFL then answers."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from installed_packages import Packages
from settings_loader import CPU
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_fl import load_plugin, startup
from sglang_fl.check.runner import Job
from sglang_fl.check.worker import Worker
from sglang_fl.cli.doctor.checks import Machine, declared_platform
from sglang_fl.config import Settings, SettingsError, load_settings
from sglang_fl.device import (
    CAPABILITIES,
    ENTRY_POINT_GROUP,
    KV_POOL_KINDS,
    Device,
    KernelReplacement,
    VendorPlatform,
    declared,
    describe_platforms,
    detect,
    known_vendors,
    probe,
    vendor_problems,
)
from sglang_fl.dispatch import OpManager
from sglang_fl.platform import platform_class
from sglang_fl.startup.words import settings_words

GROUP = {ENTRY_POINT_GROUP: "{module}:PLATFORM"}
IMPORT = "from sglang_fl.vendor_platform import VendorPlatform\n"


def declare(packages: Packages, name: str = "mychip", more: str = "", head: str = "") -> str:
    """A package that declares a chip which is there, of device type cpu. Its module's name."""
    line = f"PLATFORM = VendorPlatform(name={name!r}, {more or 'is_present=lambda: True'}, device_type='cpu')\n"
    return packages.install(f"{IMPORT}{head}\n{line}", GROUP, name=name)


def test_the_words_are_sglangs() -> None:
    from sglang.srt.platforms.interface import _LEGACY_KV_POOL_HOOKS

    assert set(CAPABILITIES) == set(PlatformCapabilities.__struct_fields__)
    assert set(KV_POOL_KINDS) == set(_LEGACY_KV_POOL_HOOKS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "My-Chip"}, "not 'My-Chip'; did you mean 'my_chip'?"),
        ({"name": ""}, "a vendor's name must be a Python identifier"),
        ({"name": "class"}, "a vendor's name must be a Python identifier"),
        ({"name": 3}, "a vendor's name must be a Python identifier"),
        ({"name": "reference"}, "means something else in the settings"),
        ({"name": "npu"}, "'npu' is another name for 'ascend'"),
        ({"name": "mychip_"}, "begins and ends with a letter or digit, not 'mychip_'; did you mean 'mychip'?"),
        ({"name": "triton"}, "'triton' means something else in the settings"),
        ({"name": "all"}, "'all' means something else in the settings"),
        (
            {"name": "mthreads", "device_type": "", "commands": (), "kv_pools": {"mah": "a:B"}},
            "kind of KV pool 'mah'; did you mean",
        ),
        ({"group_device": "cpu:0"}, "group_device must be the name of a torch.device type without an index, not 'cpu:0'"),
        ({"collective": ""}, "collective must not be empty"),
        ({"attention_backends": {3: "m:C"}}, "attention_backends must map names to 'module:Class', not {3: 'm:C'}"),
        ({"server_args": {3: 4}}, "server_args must map names to values, not {3: 4}"),
        ({"quantization": {"": "m:C"}}, "quantization must map names to"),
        ({"stand_ins": {"triton": True}}, "stand_ins['triton'] must be the name of a module or None, not True"),
        ({"profile": 3}, "profile must be the name of a file, not 3"),
        ({"profile": b"x"}, "profile must be the name of a file, not b'x'"),
        ({"commands": ("",)}, "commands: leave out the empty string, ('',)"),
        ({"variables": ("FAST X",)}, "variables: 'FAST X' is not the name of an environment variable"),
        ({"variables": ("a=b",)}, "variables: 'a=b' is not the name"),
        ({"name": "mthreads", "device_type": ""}, "commands: SGLang detects mthreads itself; leave it out"),
        ({"name": "cpu"}, "there is a platform for 'cpu' already"),
        ({"device_type": "my chip"}, "device_type must be the name of a torch.device type, not 'my chip'"),
        ({"commands": "mychip-smi"}, "commands must be a tuple of strings, not 'mychip-smi'"),
        ({"commands": ()}, "give device_files, commands or is_present"),
        ({"is_present": True}, "is_present must be a function without arguments, not True"),
        ({"capabilities": ("graph_captur",)}, "unknown capability 'graph_captur'; did you mean 'graph_capture'?"),
        ({"capabilities": ("graph_capture",)}, "graph_capture needs a graph_runner"),
        ({"kv_pools": {"mla2": "a:B"}}, "unknown kind of KV pool 'mla2'; did you mean 'mla'?"),
        ({"kv_pools": ["a:B"]}, "kv_pools must map names"),
        ({"draft_graph_runners": {"draft_decod": "a:B"}}, "unknown phase of a draft model 'draft_decod'; did you mean 'draft_decode'?"),
        ({"quantization": {"fp8": "a"}}, "quantization['fp8'] must be written 'module:Class', not 'a'"),
        ({"sglang_kernels": {"triton.x:f": "a:b"}}, "a kernel of SGLang's is written 'sglang.module:name', not 'triton.x:f'"),
        ({"sglang_kernels": {"sglang.x:f": "a.b"}}, "sglang_kernels['sglang.x:f'] must be 'module:function' or KernelReplacement("),
        (
            {"sglang_kernels": {"sglang.x:f": KernelReplacement("a:b", writes_inputs="no")}},  # type: ignore[arg-type]
            "sglang_kernels['sglang.x:f']: writes_inputs must be True or False, not 'no'",
        ),
        ({"stand_ins": {"sgl_kernels": None}}, "stand_ins: unknown package 'sgl_kernels'; did you mean 'sgl_kernel'?"),
        ({"stand_ins": {"sgl_kernel": "a:b"}}, "stand_ins['sgl_kernel'] must be the name of a module or None, not 'a:b'"),
        ({"stand_ins": {"triton": "triton"}}, "stand_ins['triton'] must be a module of the chip's package, not 'triton' itself"),
        ({"stand_ins": ["triton"]}, "stand_ins must map names to a module or None"),
        ({"hide_installed": ("tritn",), "stand_ins": {"triton": None}}, "'tritn' is not one of stand_ins; did you mean 'triton'?"),
        ({"server_args": ("page_size",)}, "server_args must map names to values"),
        ({"speculative_algorithms": "EAGLE"}, "speculative_algorithms must be a tuple of strings"),
        ({"variables": "MYCHIP_FUSE"}, "variables must be a tuple of strings"),
        ({"device_type": ""}, "device_type must be the name of a torch.device type, not ''"),
        ({"graph_runner": "a.b.C"}, "graph_runner must be written 'module:Class', not 'a.b.C'"),
        ({"attention_backends": {"x": 3}}, "attention_backends['x'] must be written 'module:Class', not 3"),
        ({"platform_class": "a b:C"}, "platform_class must be written 'module:Class', not 'a b:C'"),
        ({"profile": "/no/such.yaml"}, "profile: there is no file '/no/such.yaml'"),
    ],
)
def test_what_a_declaration_cannot_say(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        VendorPlatform(**{"name": "mychip", "device_type": "mychip", "commands": ("mychip-smi",), **wrong})
    assert message in str(caught.value)


def test_a_chip_is_known_by_file_by_command_or_by_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evidence(**how: Any) -> str | None:
        return VendorPlatform(name="mychip", device_type="mychip", **how).evidence()

    (tmp_path / "mychip0").touch()
    tool = tmp_path / "mychip-smi"
    tool.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert evidence(device_files=(f"{tmp_path}/mychip[0-9]",)) == f"device file {tmp_path}/mychip[0-9]"
    assert evidence(device_files=(f"{tmp_path}/other*",), commands=("mychip-smi",)) == "mychip-smi on PATH"
    assert evidence(commands=("other-smi",)) is None
    assert evidence(commands=("mychip-smi",), is_present=lambda: False) is None
    assert evidence(is_present=lambda: True) == "reported by its package"


def test_a_chip_that_is_there_goes_before_what_pytorch_sees(packages: Packages) -> None:
    module = declare(packages)
    for found in (detect(environ={}), probe({})):
        assert (found.vendor, found.device_type, found.in_tree) == ("mychip", "cpu", None)
        assert found.evidence == f"reported by its package, package {module} (entry point {module})"
    assert detect(environ={"SGLANG_USE_CPU_ENGINE": "1"}).vendor == "cpu"
    assert detect(environ={"GEMS_VENDOR": "metax"}).vendor == "cpu", "another was asked for"


def test_a_chip_that_is_not_there_changes_nothing(packages: Packages) -> None:
    declare(packages, more="commands=('no-such-tool',)")
    assert detect(environ={}).vendor == probe({}).vendor == "cpu"
    assert detect(environ={"GEMS_VENDOR": "MyChip"}).vendor == probe({"GEMS_VENDOR": "mychip"}).vendor == "mychip"
    assert load_settings({"SGLANG_FL_PLATFORM": "mychip"}, device=CPU).platform == "mychip"


def test_a_name_near_to_a_declared_one(packages: Packages) -> None:
    declare(packages, more="commands=('no-such-tool',)")
    with pytest.raises(SettingsError) as caught:
        load_settings({"GEMS_VENDOR": "mychp", "SGLANG_FL_PLATFORM": "mychp"}, device=CPU)
    assert [problem.count("did you mean 'mychip'?") for problem in caught.value.problems] == [1, 1]


def problems_of(**environ: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        startup.check_settings(environ, CPU, OpManager())
    return caught.value.problems


def test_of_two_that_are_there_one_must_be_chosen(packages: Packages) -> None:
    declare(packages, "zchip"), declare(packages, "achip")
    (message,) = problems_of()
    assert message.startswith("2 packages detect their chips: achip (") and message.endswith("set GEMS_VENDOR to the one to use")
    assert detect(environ={}).vendor == "achip"
    environ = {"GEMS_VENDOR": "zchip"}
    startup.check_settings(environ, detect(environ=environ), OpManager())


@pytest.mark.parametrize("environ", [{"GEMS_VENDOR": "ascend"}, {"GEMS_VENDOR": "NPU "}, {"GEMS_VENDOR": "nvidia"}])
def test_a_vendor_whose_chip_is_not_here_stops_a_server(environ: dict[str, str]) -> None:
    (problem,) = problems_of(**environ)
    assert "does not apply: the device here is cpu (a test)" in problem and "unset GEMS_VENDOR" in problem


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such", "ModuleNotFoundError: No module named 'no_such' ({file}:1)"),
        ("raise SystemExit(3)", "SystemExit: 3 ({file}:1)"),
        ("PLATFORM = {'name': 'mychip'}", "{module}:PLATFORM is {{'name': 'mychip'}}, not a VendorPlatform"),
        (f"{IMPORT}PLATFORM = VendorPlatform(name='mychip', device_type='x')", "otherwise the chip cannot be detected ({file}:2)"),
        (
            f"{IMPORT}PLATFORM = VendorPlatform(name='mychip', devicetype='x')",
            "VendorPlatform: unknown field 'devicetype'; did you mean 'device_type'?",
        ),
    ],
)
def test_a_package_whose_declaration_is_broken(packages: Packages, code: str, message: str) -> None:
    broken = packages.install(code, GROUP, name="broken")
    sound = declare(packages, "sound")
    assert detect(environ={}).vendor == "sound", "import sglang goes on"
    (problem,) = problems_of()
    assert problem.startswith(f"the platform that {broken} (entry point {broken}) declares cannot be used: ")
    assert message.format(module=broken, file=packages.directory / f"{broken}.py") in problem
    assert declared().origins == {"sound": f"{sound} (entry point {sound})"}


def test_a_declaration_that_imports_sglang(packages: Packages) -> None:
    """SGLang asks for platforms while it is imported; here the module does so itself, as SGLang is there already."""
    module = declare(packages, head="import sglang_fl.device\nsglang_fl.device.declared()")
    told = f"the platform that {module} (entry point {module}) declares cannot be used: its module imports SGLang, which asks for platforms"
    declared()
    (problem,) = problems_of()
    assert problem.startswith(told)


def test_a_detection_that_raises(packages: Packages) -> None:
    module = declare(packages, more="is_present=lambda: 1 / 0")
    assert detect(environ={}).vendor == "cpu"
    assert describe_platforms() == [f"mychip ({module} (entry point {module})): unknown"]
    (problem,) = problems_of()
    assert problem.startswith(f"cannot tell whether mychip is here: is_present of {module} (entry point {module}) raised ZeroDivisionError")


def test_two_packages_for_one_chip(packages: Packages) -> None:
    first, second = declare(packages), declare(packages)
    (problem,) = problems_of()
    assert first in problem and second in problem and "both" in problem


def test_a_package_takes_the_place_of_a_row_of_our_table(packages: Packages) -> None:
    declare(packages, "metax", "attention_backends={'maca': 'a:B'}, collective='mccl', commands=('mx-smi',)")
    row = known_vendors()["metax"]
    assert (row.device_type, row.collective, row.attention, row.flaggems) == ("cpu", "mccl", "maca", False)


def test_a_collective_library_of_a_package_can_be_asked_for(packages: Packages) -> None:
    declare(packages, more="collective='zccl', is_present=lambda: True")
    assert load_settings({"SGLANG_FL_DIST_BACKEND": "zccl"}, device=CPU).dist_backend == "zccl"
    with pytest.raises(SettingsError, match="did you mean 'zccl'"):
        load_settings({"SGLANG_FL_DIST_BACKEND": "zcc"}, device=CPU)


def test_the_packages_profile_is_in_force(packages: Packages, tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("prefer: vendor\nop_backends:\n  rms_norm: [reference]\n")
    declare(packages, more=f"is_present=lambda: True, profile={str(profile)!r}")
    device = detect(environ={})
    settings = load_settings({}, device=device, words=settings_words(OpManager()))
    assert (settings.prefer, settings.op_backends, settings.platform) == ("vendor", (("rms_norm", ("reference",)),), "mychip")
    assert str(settings.source("prefer")) == f"{profile}:1"
    profile.write_text("prefr: vendor\n")
    with pytest.raises(SettingsError, match=r"profile\.yaml:1: unknown key 'prefr'; did you mean 'prefer'"):
        load_settings({}, device=device)


CLASSES = """
class Answers:
    def get_compile_backend(self, mode=None):
        return "chipc"
    def apply_server_args_defaults(self, server_args):
        server_args.page_size = 128
    def init_backend(self):
        self.started = True
    def get_torch_distributed_backend_str(self):
        return "chipccl"
class Runner: pass
class Pool: pass
class Attention:
    def __init__(self, runner):
        self.runner = runner
not_a_class = 3
"""


AN_ATTENTION = "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend"


def declared_with(packages: Packages, **fields: str) -> Any:
    """A platform of a package whose own module holds the classes."""
    classes = packages.install(CLASSES, {}, name="classes")
    more = {"is_present": "lambda: True", **fields}
    declare(packages, more=", ".join(f"{field}={value.replace('M:', f'{classes}:')}" for field, value in more.items()))
    return platform_class(Device("mychip", "cpu", None, "a test"))()


def test_what_a_declaration_answers(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = declared_with(
        packages,
        graph_runner="'M:Runner'",
        graph_backend="'M:Runner'",
        piecewise_backend="'M:Runner'",
        paged_allocator="'M:Pool'",
        kv_pools="{'mha': 'M:Pool'}",
        capabilities="('graph_capture', 'supports_triton')",
        attention_backends="{'chip_attention': 'M:Attention'}",
        collective="'chipccl'",
    )
    assert platform.is_out_of_tree() and (platform.device_name, platform.device_type) == ("mychip", "cpu")
    assert platform.get_device(3) == "cpu"
    for cls in (platform.get_graph_runner_cls(), platform.get_full_graph_backend_cls(), platform.get_piecewise_backend_cls()):
        assert cls.__name__ == "Runner"
    assert platform.get_paged_allocator_cls().__name__ == platform.get_kv_pool_cls(kind="mha").__name__ == "Pool"
    assert platform.get_kv_pool_cls(kind="mla") is None
    assert platform.capabilities == PlatformCapabilities(graph_capture=True, supports_triton=True)
    assert platform.get_default_attention_backend() == "chip_attention"
    monkeypatch.setattr(startup, "_current", Settings())
    assert platform.get_torch_distributed_backend_str() == "chipccl"


def test_a_bare_declaration_leaves_the_rest_to_sglang(packages: Packages) -> None:
    platform = declared_with(packages)
    for ask in ("get_graph_runner_cls", "get_full_graph_backend_cls", "get_piecewise_backend_cls", "get_paged_allocator_cls"):
        assert getattr(platform, ask)() is None
    assert platform.capabilities == PlatformCapabilities()
    assert platform.get_default_attention_backend() == "torch_native"


def test_attention_backends_are_registered_and_can_be_asked_for(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention import attention_registry

    monkeypatch.setattr(attention_registry, "ATTENTION_BACKENDS", dict(attention_registry.ATTENTION_BACKENDS))
    platform = declared_with(packages, attention_backends="{'chip_attention': 'M:Attention'}", platform_class="'M:Answers'")
    monkeypatch.setattr("sglang.srt.platforms._current_platform", platform)
    lists = (choices.ATTENTION_BACKEND_CHOICES, choices.DRAFT_ATTENTION_BACKEND_CHOICES)
    before = [list(names) for names in lists]
    try:
        load_plugin(), load_plugin()
        assert [names[len(old) :] for names, old in zip(lists, before, strict=True)] == [["chip_attention"]] * 2
    finally:
        for names, old in zip(lists, before, strict=True):
            names[:] = old
    platform.init_backend()
    made = attention_registry.ATTENTION_BACKENDS["chip_attention"]("the runner")
    assert type(made).__name__ == "Attention" and made.runner == "the runner"
    assert platform.started, "the package's own comes too"


def apply(platform: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(startup, "resolve", lambda device: resolved.append(device) or Settings())
    monkeypatch.setattr("sglang_fl.platform.plain_cpu._given", lambda server_args, name: 1)
    monkeypatch.setattr("sglang_fl.platform.plain_cpu._share_cores", lambda server_args: None)
    monkeypatch.setattr("sglang_fl.platform.hybrids.leave_out_snapshots", lambda server_args: None)
    resolved: list[Device] = []
    server_args = SimpleNamespace()
    platform.apply_server_args_defaults(server_args)
    assert len(resolved) == 1
    return server_args


def test_the_packages_class_has_the_last_word_but_cannot_drop_our_moments(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = declared_with(packages, platform_class="'M:Answers'", attention="'triton'")
    assert platform.get_compile_backend() == "chipc"
    monkeypatch.setattr(startup, "_current", Settings(dist_backend="gloo"))
    assert platform.get_torch_distributed_backend_str() == "gloo", "what the user asks for goes before both"
    monkeypatch.setattr(startup, "_current", Settings())
    assert platform.get_torch_distributed_backend_str() == "chipccl"
    assert apply(platform, monkeypatch).page_size == 128


def test_a_platform_class_that_is_sglangs_platform(packages: Packages) -> None:
    classes = packages.install(
        "from sglang.srt.platforms.interface import SRTPlatform\n"
        "class Chip(SRTPlatform):\n    def get_compile_backend(self, mode=None):\n        return super().get_compile_backend(mode) + '!'\n",
        {},
    )
    declare(packages, more=f"is_present=lambda: True, platform_class='{classes}:Chip', capabilities=('supports_triton',)")
    platform: Any = platform_class(Device("mychip", "cpu", None, "a test"))()
    assert isinstance(platform, SRTPlatform)
    assert platform.get_compile_backend() == "eager!" and platform.capabilities.supports_triton


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"platform_class": "'no_such_module:Chip'"}, "platform_class 'no_such_module:Chip' cannot be loaded: ModuleNotFoundError"),
        ({"platform_class": "'M:Chips'"}, "cannot be loaded: AttributeError"),
        ({"platform_class": "'M:not_a_class'"}, "is 3, not a class"),
        ({"platform_class": "'builtins:bool'"}, "cannot be combined with SGLang's: TypeError"),
        ({"graph_runner": "'no_such_module:Runner'"}, "graph_runner 'no_such_module:Runner' cannot be loaded: ModuleNotFoundError"),
        ({"kv_pools": "{'mla': 'M:Pool'}"}, "is not a subclass of SGLang's sglang.srt.mem_cache.memory_pool:MLATokenToKVPool"),
        ({"paged_allocator": "'M:Pool'"}, "is not a subclass of SGLang's sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator"),
        ({"attention_backends": "{'mine': 'M:Runner'}"}, "not a subclass of SGLang's sglang.srt.layers.attention.base_attn_backend:"),
        ({"kv_pools": "{'mha': 'no_such.module:Pool'}"}, "kv_pools['mha'] 'no_such.module:Pool' cannot be loaded: ModuleNotFoundError"),
        ({"attention_backends": "{'mine': 'M:NoSuchClass'}"}, "cannot be loaded: AttributeError"),
        ({"attention": "'torch_natve'"}, "unknown attention backend 'torch_natve'; did you mean 'torch_native'?"),
        (
            {"attention_backends": f"{{'triton': '{AN_ATTENTION}'}}"},
            "SGLang has an attention backend 'triton' of its own; give it another name",
        ),
        ({"device_type": "'zchip'"}, "PyTorch has no device type 'zchip': is the chip's PyTorch extension installed"),
    ],
)
def test_what_is_wrong_with_a_declaration_is_raised_where_sglang_lets_it_through(
    packages: Packages, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], message: str
) -> None:
    classes = packages.install(CLASSES, {}, name="classes")
    fields = {"device_type": "'cpu'", "is_present": "lambda: True", **fields}
    more = ", ".join(f"{field}={value.replace('M:', f'{classes}:')}" for field, value in fields.items())
    packages.install(f"{IMPORT}PLATFORM = VendorPlatform(name='mychip', {more})\n", GROUP)
    platform = platform_class(detect(environ={}))()
    with pytest.raises(SettingsError) as caught:
        apply(platform, monkeypatch)
    (problem,) = caught.value.problems
    assert message in problem and "mychip" in problem
    (in_doctor,) = declared_platform(Machine({}, detect(environ={}), OpManager(), deep=True))
    assert in_doctor.what == problem and in_doctor.fatal


def test_a_module_that_is_not_installed_is_named_without_importing_anything(packages: Packages) -> None:
    declare(packages, more="is_present=lambda: True, graph_runner='no_such_module:Runner'")
    (problem,) = vendor_problems({}, detect(environ={}))
    assert "mychip" in problem and "graph_runner: there is no module 'no_such_module'" in problem


def test_a_choice_that_there_is_not(packages: Packages) -> None:
    with pytest.raises(TypeError, match="VendorPlatform: unknown field 'attension'; did you mean 'attention'"):
        VendorPlatform(name="mychip", device_type="cpu", is_present=lambda: True, attension="triton")  # type: ignore[call-arg]
    for field, hint in (("dist_backend", "it is called 'collective'"), ("patches", "a package changes SGLang through its hooks")):
        with pytest.raises(TypeError, match=f"unknown field '{field}'; {hint}"):
            VendorPlatform(name="mychip", device_type="cpu", **{field: "x"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="each field is given by its name, as in name='mychip'"):
        VendorPlatform("mychip")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="KernelReplacement: unknown field 'take_grid'; did you mean 'takes_grid'"):
        KernelReplacement("a:b", take_grid=True)  # type: ignore[call-arg]
    declare(packages, more="is_present=lambda: True, attension='triton'")
    (problem,) = problems_of()
    assert "did you mean 'attention'?" in problem


@pytest.mark.parametrize("fields", ["chip=7", "collective=5", "attention=3", "flaggems='yes'"])
def test_a_value_of_another_type(fields: str) -> None:
    with pytest.raises(ValueError, match=fields.partition("=")[0]):
        VendorPlatform(name="mychip", device_type="cpu", is_present=lambda: True, **eval(f"dict({fields})"))


def test_a_class_that_cannot_be_loaded_says_whose_it_is(packages: Packages) -> None:
    platform = declared_with(packages, graph_runner="'M:Runer'")
    with pytest.raises(
        RuntimeError, match=r"the platform mychip that mychip_.* declares cannot be used: graph_runner .*Runer.*AttributeError"
    ):
        platform.get_graph_runner_cls()


def test_a_detection_that_answers_neither_yes_nor_no(packages: Packages) -> None:
    declare(packages, more="is_present=lambda: 'no'")
    assert any("is_present must return True or False, not 'no'" in problem for problem in vendor_problems({}, detect(environ={})))


def test_the_check_says_that_pytorch_lacks_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_fl.check.worker.detect", lambda: Device("mychip", "zchip", None, "a test"))
    with pytest.raises(SystemExit, match=r"mychip \(a test\): PyTorch has no device type 'zchip'"):
        Worker(Job([], quick=True, seed=0), print)


def test_to_know_who_declares_is_light(packages: Packages) -> None:
    """It is part of ``import sglang``, and of every command line."""
    declare(packages)
    code = """
import sys
from sglang_fl.vendor_platform import declared
print(list(declared().platforms), sorted({'torch', 'sglang', 'yaml'} & set(sys.modules)))
"""
    environ = {**os.environ, "PYTHONPATH": str(packages.directory)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.strip() == "['mychip'] []"
