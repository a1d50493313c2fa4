# SPDX-License-Identifier: Apache-2.0
"""A chip for which there is no Triton and none of SGLang's packages of kernels: an installed package brings it up.

The CPU stands for the chip. ``sgl_kernel``, ``flashinfer`` and ``deep_gemm`` are not installed, ``triton`` cannot be imported. The
package stands in for them, has an attention backend of its own, for which SGLang launches Triton kernels, and replaces those. What
a hybrid needs beside them runs in plain PyTorch.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hide_packages import hide
from installed_packages import write_package

from sglang_fl.cli.demo_model import RECITAL

from .conftest import Prompt, Running, off_by, serving
from .hybrid_model import hybrid_model
from .qwen3_moe_model import qwen3_moe_model

pytestmark = pytest.mark.e2e

HIDDEN = ("sgl_kernel", "flashinfer", "deep_gemm", "triton")
DISTRIBUTIONS = ("sglang-kernel", "flashinfer-python", "deep-gemm", "triton")
KERNELS = {
    "sglang.kernels.ops.memory.common:write_req_to_token_pool_triton": "write_request",
    "sglang.kernels.ops.attention.position:compute_position_triton": "positions",
    "sglang.kernels.ops.memory.allocator:alloc_extend_kernel": "extend",
    "sglang.kernels.ops.memory.allocator:alloc_decode_kernel": "decode",
    "sglang.kernels.ops.attention.linear.fused_gdn_gating:fused_gdn_gating": "gating",
}
OF_HYBRIDS = "sglang.kernels.ops.attention.linear.fused_gdn_gating:fused_gdn_gating"
PLATFORM = f"""
from sglang_fl.vendor_platform import KernelReplacement, VendorPlatform

PLATFORM = VendorPlatform(
    name="fastchip",
    device_type="cpu",
    is_present=lambda: True,
    capabilities=("supports_triton",),  # its own kernels take the place of those that SGLang launches then
    attention_backends={{"fastchip_attention": "fastchip_code:FastchipAttention"}},
    server_args={{"page_size": 16}},
    stand_ins={{"sgl_kernel": None, "flashinfer": None, "deep_gemm": None, "triton": None}},
    sglang_kernels={{
        target: KernelReplacement(f"fastchip_code:{{name}}", takes_grid=name == "extend") for target, name in {KERNELS!r}.items()
    }},
)
"""
CODE = """
import ctypes

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend


class FastchipAttention(TorchNativeAttnBackend):
    pass


def write_request(table, requests, prefixes, before, after, counts, slots, stride):
    start = 0
    rows = zip(requests.tolist(), prefixes.tolist(), before.tolist(), after.tolist(), counts.tolist())
    for request, pointer, first, last, count in rows:
        if first:
            table[request, :first] = torch.tensor((ctypes.c_int64 * first).from_address(pointer)[:])
        table[request, first:last] = slots[start : start + count]
        start += count


def positions(prefixes, lengths, total):
    found = [torch.arange(first, first + count) for first, count in zip(prefixes.tolist(), lengths.tolist())]
    starts = torch.tensor([0, *lengths.tolist()]).cumsum(0)[:-1]
    return torch.cat(found), starts.to(lengths.dtype)


def extend(grid, before, after, last, free, slots, upper, page_size):
    at = page = 0
    for i in range(grid[0]):
        slot = int(last[i])
        for position in range(int(before[i]), int(after[i])):
            if position % page_size == 0:
                slot, page = int(free[page]) * page_size, page + 1
            else:
                slot += 1
            slots[at] = slot
            at += 1


def decode(after, last, free, slots, upper, page_size):
    page = 0
    for i, length in enumerate(after.tolist()):
        if length % page_size == 1 or page_size == 1:
            slots[i], page = int(free[page]) * page_size, page + 1
        else:
            slots[i] = int(last[i]) + 1


def gating(A_log, a, b, dt_bias, beta=1.0, threshold=20.0):
    decay = -A_log.float().exp() * torch.nn.functional.softplus(a.float() + dt_bias.float(), beta, threshold)
    return decay.unsqueeze(0), b.float().sigmoid().unsqueeze(0)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path with the package, on which the others are hidden."""
    directory = tmp_path_factory.mktemp("fastchip")
    write_package(directory, "fastchip", PLATFORM, {"sglang_fl.platform": "fastchip:PLATFORM"})
    (directory / "fastchip_code.py").write_text(CODE)
    hide(directory, HIDDEN, DISTRIBUTIONS)
    return os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])


def started(model: Path, site: str, directory: Path, *arguments: str) -> Iterator[Running]:
    environ = {"PYTHONPATH": site, "SGLANG_MAMBA_CONV_DTYPE": "float32"}
    with serving(model, directory, *arguments, environ=environ, command=("sglang_fl", "serve")) as found:
        yield found


@pytest.fixture(scope="module")
def running(model: Path, native_logprobs: list[list[float]], site: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from started(model, site, tmp_path_factory.mktemp("dense"))


def replaced(running: Running) -> dict[str, str]:
    """The kernels of SGLang's that ran on something else."""
    return dict(line.split(" → ") for line in running.dispatched() if ":" in line.split(" → ")[0])


def test_a_dense_model_recites_on_the_packages_kernels(running: Running) -> None:
    assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL
    again = running.recite(max_tokens=20).json()["choices"][0]["message"]["content"]
    assert again and RECITAL.startswith(again), "with a prefix that is in the cache"
    assert replaced(running) == dict.fromkeys(set(KERNELS) - {OF_HYBRIDS}, "vendor(vendor.fastchip)")


def test_its_logprobs_are_right(running: Running, prompts: list[Prompt], native_logprobs: list[list[float]]) -> None:
    for prompt, native in zip(prompts, native_logprobs, strict=True):
        got = running.logprobs(prompt)
        assert off_by(got, native, prompt.bounds) <= 1 and off_by(got, prompt.exact, prompt.bounds) <= 0.5


def test_ctrl_c_ends_all_that_serve_started(running: Running) -> None:
    """As in a terminal: the signal goes to every process of the group. The last test of this server."""
    process = running.server.process
    assert process is not None
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) > 2
    os.killpg(process.pid, signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    assert "Traceback" not in running.server.last_lines(5), "nothing crashed"


@pytest.mark.slow
@pytest.mark.parametrize(("make", "arguments"), [(qwen3_moe_model, ()), (hybrid_model, ("--page-size", "1"))])
@pytest.mark.usefixtures("native_logprobs")
def test_other_models_recite(
    make: Callable[[], Path], arguments: tuple[str, ...], site: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for running in started(make(), site, tmp_path_factory.mktemp("other"), *arguments):
        assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL
        assert sum(destination == "vendor(vendor.fastchip)" for destination in replaced(running).values()) >= 3
