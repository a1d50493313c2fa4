# SPDX-License-Identifier: Apache-2.0
"""A chip that SGLang and sglang-fl know nothing of, brought up by an installed package: the CPU under a second name."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from installed_packages import pip_install

from sglang_fl.cli.demo_model import RECITAL
from sglang_fl.utils.server import Server, ServerFailed, free_port

from .conftest import Prompt, Running, off_by, serving

pytestmark = pytest.mark.e2e

#: Changes to the package that ``sglang-fl new-vendor`` writes: the template's own choices, made.
PLATFORM = {
    'device_type="lookalike"': 'device_type="cpu"',
    'device_files=("/dev/lookalike[0-9]*",)': "device_files=({device!r},)",
    '# attention_backends={"': 'attention_backends={"',
    "# kv_pools={": "kv_pools={",
    ', "mla": "sglang_fl_lookalike.kv_cache:LookalikeMLAPool"': "",
    "# paged_allocator=": "paged_allocator=",
    '# collective="gloo"': 'collective="lookalike_ccl"',
    '# group_device="cpu"': 'group_device="meta"',
    '# capabilities=("supports_triton", "graph_capture", "piecewise_graph", "hicache_device_kernels", "supports_pynccl")': (
        'capabilities=("graph_capture", "supports_pynccl")'
    ),
    "# graph_runner=": "graph_runner=",
    '# compile_backend="eager"': 'compile_backend="lookalike_compiler"',
    '# quantization={"lookalike_int8": "sglang_fl_lookalike.quantization:LookalikeInt8Config"}': (
        'quantization={"lookalike_wide": "sglang_fl_lookalike.quantization:LookalikeWideConfig"}'
    ),
    '# server_args={"page_size": 128},': 'server_args={"page_size": 16, "max_running_requests": 20},',
    '# variables=("LOOKALIKE_FUSE_ATTENTION",),': 'variables=("LOOKALIKE_SEEN",),',
    "# platform_class=": "platform_class=",
}
PROFILE = """
op_backends:
  rms_norm: [vendor:lookalike]
  silu_and_mul: [reference]
  rotary_embedding: [sglang]
"""
SEEN = """
import os

def seen(what):
    with open(os.environ["LOOKALIKE_SEEN"], "a") as log:
        print(what, file=log)
"""
ATTENTION = """
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.runtime_context import get_parallel

from .seen import seen

class LookalikeAttention(TorchNativeAttnBackend):
    def __init__(self, runner):
        super().__init__(runner)
        group = get_parallel().pp_group
        seen(f"group of ranks on {group.device.type}, and so are its tensors: {group.active_ranks.is_meta}")
        if group.pynccl_comm is not None:
            seen("PyNccl")

    def forward_extend(self, *args, **kwargs):
        seen("attention of a prefill")
        return super().forward_extend(*args, **kwargs)

    def forward_decode(self, *args, **kwargs):
        seen("attention of a decode step")
        return super().forward_decode(*args, **kwargs)
"""
KV_CACHE = """
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from .seen import seen

class LookalikeMHAPool(MHATokenToKVPool):
    def _create_buffers(self):
        seen("KV pool")
        super()._create_buffers()

class LookalikePagedAllocator(PagedTokenToKVPoolAllocator):
    def alloc_extend(self, *args, **kwargs):
        seen("allocator")
        return super().alloc_extend(*args, **kwargs)
"""
#: Its linear layers keep their weights in float64: what they compute is as exact as it was.
QUANTIZATION = """
import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from .seen import seen

class Wide(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer):
        layer.weight = torch.nn.Parameter(layer.weight.double(), requires_grad=False)

    def apply(self, layer, x, bias=None):
        seen("quantised linear")
        return torch.nn.functional.linear(x.double(), layer.weight, bias).to(x.dtype)

class LookalikeWideConfig(QuantizationConfig):
    @classmethod
    def get_name(cls):
        return "lookalike_wide"

    @classmethod
    def get_supported_act_dtypes(cls):
        return [torch.float32]

    @classmethod
    def get_min_capability(cls):
        return 0

    @staticmethod
    def get_config_filenames():
        return []

    @classmethod
    def from_config(cls, config):
        return cls()

    def get_quant_method(self, layer, prefix):
        return Wide() if isinstance(layer, LinearBase) else None

    def get_scaled_act_names(self):
        return []
"""
GRAPHS = """
from sglang.srt.model_executor.runner import EagerRunner, get_batch_sizes_to_capture

from .seen import seen

class LookalikeGraphRunner:
    def __init__(self, model_runner):
        self.eager = EagerRunner(model_runner, run_warmup=False)
        self.capture_bs, _ = get_batch_sizes_to_capture(model_runner)

    def can_run_graph(self, batch):
        return batch.batch_size <= max(self.capture_bs)

    def execute(self, batch, **kwargs):
        seen("decode graph")
        return self.eager.execute(batch, **kwargs)
"""
COMPILER = """
from .seen import seen

def compiler(module, inputs):
    seen("compiler")
    return module.forward
"""
SGLANG_PLATFORM = """
from .seen import seen

class LookalikePlatform:
    def init_backend(self):
        seen("init_backend")

    def get_device_name(self, device_id=0):
        return "Lookalike 1"
"""
#: PyTorch loads it by itself. Its second device type, for the groups of ranks, is PyTorch's own of tensors without data, which a CPU has.
TORCH_EXTENSION = """
import torch

from .seen import seen

def register():
    torch.distributed.Backend.register_backend("lookalike_ccl", process_group, devices=["cpu"])
    torch._register_device_module("meta", torch.cpu)

def process_group(store, rank, size, timeout):
    seen("process group")
    return torch.distributed.ProcessGroupGloo(store, rank, size, timeout=timeout)
"""
ENTRY_POINTS = """
[project.entry-points."torch.backends"]
lookalike = "sglang_fl_lookalike.torch_extension:register"

[project.entry-points.torch_dynamo_backends]
lookalike_compiler = "sglang_fl_lookalike.compiler:compiler"
"""
CHANGES = """
import os

from .seen import seen

SEND = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin._pp_send_dict_to_next_stage"

def register():
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if current_platform.device.vendor == "lookalike":
        HookRegistry.register(SEND, send, HookType.AROUND)

def send(original, *args, **kwargs):
    seen(f"pipeline send of {os.getpid()}")
    return original(*args, **kwargs)
"""
SEND = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin._pp_send_dict_to_next_stage"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package was installed."""
    directory = tmp_path_factory.mktemp("lookalike")
    (directory / "lookalike0").touch()
    command = [sys.executable, "-m", "sglang_fl", "new-vendor", "lookalike", str(directory / "package")]
    subprocess.run(command, check=True, capture_output=True)
    package = directory / "package" / "sglang_fl_lookalike"
    text = (package / "platform.py").read_text(encoding="utf-8")
    for template, chosen in PLATFORM.items():
        assert text.count(template) == 1, template
        text = text.replace(template, chosen.format(device=f"{directory}/lookalike[0-9]*") if "device" in template else chosen)
    (package / "platform.py").write_text(text, encoding="utf-8")
    (package / "profile.yaml").write_text(PROFILE)
    modules = {
        "seen": SEEN,
        "attention": ATTENTION,
        "kv_cache": KV_CACHE,
        "quantization": QUANTIZATION,
        "graphs": GRAPHS,
        "compiler": COMPILER,
        "torch_extension": TORCH_EXTENSION,
        "sglang_platform": SGLANG_PLATFORM,
        "changes": CHANGES,
    }
    for name, code in modules.items():
        (package / f"{name}.py").write_text(code)
    project = directory / "package" / "pyproject.toml"
    entry = '[project.entry-points."sglang.srt.plugins"]\n{}lookalike = "sglang_fl_lookalike.changes:register"\n'
    commented = "# " + entry.format("# ")
    text = project.read_text(encoding="utf-8")
    assert commented in text
    project.write_text(text.replace(commented, entry.format("") + ENTRY_POINTS), encoding="utf-8")
    pip_install(directory / "package", directory / "site")
    return directory / "site"


def path_of(site: Path) -> str:
    return os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def running(
    model: Path, native_logprobs: list[list[float]], site: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, Path]]:
    directory = tmp_path_factory.mktemp("serving")
    seen = directory / "seen"
    # SGLang asks for a CPU's graphs only with --enable-torch-compile.
    arguments = ("--pp-size", "2", "--quantization", "lookalike_wide", "--enable-torch-compile")
    # PyNccl needs a GPU: it finds no library, and so has nothing to do.
    environ = {"PYTHONPATH": path_of(site), "LOOKALIKE_SEEN": str(seen), "SGLANG_NCCL_SO_PATH": "/no/libnccl.so"}
    with serving(model, directory, *arguments, environ=environ) as found:
        yield found, seen


def test_it_serves_and_everything_of_the_package_ran(running: tuple[Running, Path]) -> None:
    server, log = running
    assert server.recite().json()["choices"][0]["message"]["content"] == RECITAL
    seen = [line for line in log.read_text().splitlines() if "pipeline send" not in line]
    assert set(seen) == {
        "init_backend",
        "process group",
        "group of ranks on meta, and so are its tensors: True",
        "PyNccl",
        "KV pool",
        "allocator",
        "attention of a prefill",
        "attention of a decode step",
        "quantised linear",
        "decode graph",
    }
    layers = seen.count("attention of a prefill")
    assert layers > 0 and seen.count("attention of a decode step") > 50 * layers, "every layer's, at every token"
    info = requests.get(f"{server.server.url}/get_server_info", timeout=60).json()
    assert (info["attention_backend"], info["device"], info["page_size"]) == ("lookalike_attention", "cpu", 16)
    assert (info["quantization"], info["max_running_requests"]) == ("lookalike_wide", 20)


def test_what_sglang_compiles_goes_to_its_compiler(running: tuple[Running, Path]) -> None:
    server, log = running
    assert "compiler" not in log.read_text()
    assert server.recite(max_tokens=4, repetition_penalty=1.1).json()["choices"][0]["finish_reason"] == "length"
    assert "compiler" in log.read_text()


def test_its_change_to_the_pipelines_sends_runs_in_each_process(running: tuple[Running, Path]) -> None:
    server, log = running
    server.recite()
    assert len({line for line in log.read_text().splitlines() if line.startswith("pipeline send of ")}) == 2
    told = [line for line in server.server.log.read_text().splitlines() if "SGLang is changed: " in line and "lookalike" in line]
    assert len(told) == 1
    assert told[0].endswith(f"{SEND}: around, by sglang-fl-lookalike (sglang_fl_lookalike.changes.send)")


@pytest.mark.slow
def test_its_change_can_be_left_out(site: Path, tmp_path: Path) -> None:
    code = """
import sglang
from sglang.srt.plugins import load_plugins
from sglang_fl.platform.changes import changes_made, packages_with_changes
load_plugins()
print([change for change in changes_made() if "lookalike" in change], packages_with_changes())
"""
    environ = {**os.environ, "PYTHONPATH": path_of(site), "LOOKALIKE_SEEN": str(tmp_path / "seen"), "SGLANG_FL_PATCHES": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.splitlines()[-1] == "[] ['sglang-fl-lookalike (entry point lookalike)']"


def test_its_profile_is_in_force_and_its_operator_bound(running: tuple[Running, Path]) -> None:
    server, _ = running
    assert server.dispatched() == {
        "RMSNorm → vendor(vendor.lookalike)",
        "SiluAndMul → reference(reference.torch)",
        "RotaryEmbedding → sglang(policy)",
    }


def test_its_logprobs_are_right(running: tuple[Running, Path], prompts: list[Prompt], native_logprobs: list[list[float]]) -> None:
    for prompt, native in zip(prompts, native_logprobs, strict=True):
        got = running[0].logprobs(prompt)
        assert off_by(got, native, prompt.bounds) <= 1 and off_by(got, prompt.exact, prompt.bounds) <= 0.5


def test_what_is_wrong_with_its_platform_stops_the_server(model: Path, site: Path, tmp_path: Path) -> None:
    """SGLang takes what is raised while it is imported for no platform at all, and would serve on something else."""
    broken = tmp_path / "site"
    subprocess.run(["cp", "-r", str(site), str(broken)], check=True)
    (broken / "sglang_fl_lookalike" / "sglang_platform.py").write_text("import torch_lookalike\n")
    with (
        Server(model, port=free_port(), log=tmp_path / "server.log", environ={"PYTHONPATH": path_of(broken)}) as server,
        pytest.raises(ServerFailed),
    ):
        server.wait_until_ready()
    assert server.process is not None and server.process.returncode not in (0, None)
    last = server.last_lines(1)
    assert "SettingsError" in last and "platform lookalike that sglang-fl-lookalike (entry point lookalike) declares cannot be used" in last
    assert "ModuleNotFoundError: No module named 'torch_lookalike'" in last
