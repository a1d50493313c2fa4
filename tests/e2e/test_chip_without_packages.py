# SPDX-License-Identifier: Apache-2.0
"""A chip for which there is no Triton and none of SGLang's packages of kernels: an installed package brings it up.

The CPU stands for the chip. ``sgl_kernel``, ``flashinfer`` and ``deep_gemm`` are not installed, ``triton`` cannot be imported. The
package stands in for them, has an attention backend of its own, for which SGLang launches Triton kernels, and replaces some of
those; the others run in plain PyTorch.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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
    "sglang.kernels.ops.memory.common:get_last_loc_triton": "last_location",
    "sglang.kernels.ops.attention.position:compute_position_triton": "positions",
    "sglang.kernels.ops.memory.allocator:alloc_extend_kernel": "extend",
}
PLATFORM = f"""
from sglang_fl.vendor_platform import KernelReplacement, VendorPlatform

PLATFORM = VendorPlatform(
    name="fastchip",
    device_type="cpu",
    is_present=lambda: True,
    capabilities=("supports_triton",),  # its own kernels take the place of those that SGLang launches then
    attention_backends={{"fastchip_attention": "fastchip_code:FastchipAttention"}},
    server_args={{"page_size": 16}},
    stand_ins={{"sgl_kernel": "fastchip_sgl_kernel", "flashinfer": None, "deep_gemm": None, "triton": None}},
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


def last_location(table, requests, lengths):
    return torch.where(lengths > 0, table[requests, lengths - 1], -1).to(lengths.dtype)


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
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path with the package, on which the others are hidden."""
    directory = tmp_path_factory.mktemp("fastchip")
    write_package(directory, "fastchip", PLATFORM, {"sglang_fl.platform": "fastchip:PLATFORM"})
    (directory / "fastchip_code.py").write_text(CODE)
    (directory / "fastchip_sgl_kernel.py").write_text("def of_fastchip():\n    return 'provided'\n")
    hide(directory, HIDDEN, DISTRIBUTIONS)
    return os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])


def started(model: Path, site: str, directory: Path, *arguments: str) -> Iterator[Running]:
    with serving(model, directory, *arguments, environ={"PYTHONPATH": site}, command=("sglang_fl", "serve")) as found:
        yield found


@pytest.fixture(scope="module")
def running(model: Path, native_logprobs: list[list[float]], site: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from started(model, site, tmp_path_factory.mktemp("dense"))


def replaced(running: Running) -> dict[str, str]:
    """The kernels of SGLang's that ran on something else."""
    return dict(line.split(" → ") for line in running.dispatched() if ":" in line.split(" → ")[0])


def test_a_dense_model_recites_on_the_packages_kernels(running: Running) -> None:
    assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL
    assert running.recite(max_tokens=20).status_code == 200  # with a prefix that is in the cache
    found = replaced(running)
    assert {name for name, destination in found.items() if destination == "vendor(vendor.fastchip)"} == set(KERNELS)
    assert set(found.values()) <= {"vendor(vendor.fastchip)", "reference(reference.torch)"}


def test_its_logprobs_are_right(running: Running, prompts: list[Prompt], native_logprobs: list[list[float]]) -> None:
    for prompt, native in zip(prompts, native_logprobs, strict=True):
        got = running.logprobs(prompt)
        assert off_by(got, native, prompt.bounds) <= 1 and off_by(got, prompt.exact, prompt.bounds) <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("make", [qwen3_moe_model, hybrid_model])
def test_other_models_recite(
    make: Callable[[], Path], native_logprobs: list[list[float]], site: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for running in started(make(), site, tmp_path_factory.mktemp("other")):
        assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL
        assert sum(destination == "vendor(vendor.fastchip)" for destination in replaced(running).values()) >= 3


CALLS = """
from sglang_fl.device import probe
from sglang_fl.platform.absent_packages import stand_in_for_absent_packages

stand_in_for_absent_packages(probe())
import sgl_kernel
import torch
import triton
from flashinfer.sampling import top_k_top_p_sampling_from_probs
from sglang.kernels.ops.memory.common import get_last_loc_kernel
from torch.utils._triton import has_triton

print(sgl_kernel.of_fastchip(), triton.cdiv(7, 2), has_triton())
for call in (top_k_top_p_sampling_from_probs, get_last_loc_kernel[(1,)], sgl_kernel.rmsnorm, triton.compile):
    try:
        call(1)
    except NotImplementedError as error:
        print(error)
"""


def test_what_is_not_given_says_so_when_it_is_called(site: str) -> None:
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": site})
    provided, sampling, kernel, norm, compiles = done.stdout.splitlines() or [done.stderr] * 5
    assert provided == "provided 4 False"
    assert sampling.startswith("SGLang called flashinfer.sampling.top_k_top_p_sampling_from_probs, and flashinfer is not installed")
    target = "sglang.kernels.ops.memory.common:get_last_loc_kernel"
    assert kernel.startswith(f"SGLang launched its Triton kernel {target}") and f"sglang_kernels={{'{target}': " in kernel
    assert norm.startswith("SGLang called sgl_kernel.rmsnorm") and compiles.startswith("SGLang called triton.compile")
