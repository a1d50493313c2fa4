# SPDX-License-Identifier: Apache-2.0
"""Modules in the place of packages that cannot be used: what a chip's package provides of them, and what it does not."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hide_packages import hide
from installed_packages import write_package

from sglang_fl.platform.absent_packages import _finder

HIDDEN = ("sgl_kernel", "flashinfer", "deep_gemm", "triton")
DISTRIBUTIONS = ("sglang-kernel", "flashinfer-python", "deep-gemm", "triton")
PLATFORM = """
from sglang_fl.vendor_platform import VendorPlatform

PLATFORM = VendorPlatform(
    name="fastchip",
    device_type="cpu",
    is_present=lambda: True,
    stand_ins={"sgl_kernel": "fastchip_sgl_kernel", "flashinfer": None, "deep_gemm": None, "triton": None},
    sglang_kernels={"sglang.kernels.ops.memory.allocator:alloc_decode_kernel": "fastchip_kernels:decode"},
)
"""
KERNELS = """
import sglang.srt.utils


def decode(*args):
    raise ValueError("reached")
"""
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

from sgl_kernel import imported, spatial
print(imported.f(), spatial.f())
print(sgl_kernel.of_fastchip(), triton.cdiv(7, 2), has_triton())
for call in (top_k_top_p_sampling_from_probs, get_last_loc_kernel[(1,)], sgl_kernel.rmsnorm, triton.compile, imported.g):
    try:
        call(1)
    except NotImplementedError as error:
        print(error)
"""
SERVERS = """
import sys
from pathlib import Path

from sglang_fl.cli import demo, kernel_trace, main
from sglang_fl.utils import server

class Ends(server.Server):
    def __enter__(self):
        print(*self._command[1:3])
        raise server.ServerFailed("by the test")

server.Server = kernel_trace.Server = Ends
demo._model = lambda console: Path("model")
main(["demo"])
main(["kernels", "--model", sys.argv[1], "--trace"])
"""

#: Installed: one that cannot be imported, two that can, one of which is hidden; and Triton, which finds no driver.
INSTALLED = """
import triton
from torch.utils._triton import has_triton

from sglang_fl.device import probe
from sglang_fl.platform.absent_packages import stand_in_for_absent_packages

for package, why in stand_in_for_absent_packages(probe()).items():
    print(package, why)
import deep_gemm, flashinfer, sgl_kernel
import triton as stand_in
from sglang.kernels.ops.memory.common import get_last_loc_kernel

print(sgl_kernel.of_fastchip(), deep_gemm.own, stand_in is triton, has_triton())
for call in (sgl_kernel.rmsnorm, flashinfer.own, get_last_loc_kernel[(1,)]):
    try:
        call(1)
    except NotImplementedError as error:
        print(error)
"""
DRIVERLESS = """
class backends:
    class fast:
        class driver:
            is_active = staticmethod(lambda: False)

    backends = {"fast": fast}
"""

ENGINE = """
import sys
from pathlib import Path

from sglang_fl.tune.bench import Bench
from sglang_fl.tune.served import Lengths

sys.stderr = sys.stdout
Bench(["--model-path", "model", "--no-such-argument"], Path(sys.argv[1]), Lengths(8, 2, 2), (1,)).start()
"""

BROKEN = PLATFORM.replace('"fastchip"', '"broken"').replace(
    '"flashinfer": None, "deep_gemm": None, "triton": None', '"flashinfer": "fastchip_flashinfr", "triton": "fastchip_triton"'
)
DOCTOR = """
import os
import sys

os.environ["GEMS_VENDOR"] = "broken"
from sglang_fl.cli import main

sys.stderr = sys.stdout
main(["doctor", "--deep"])
"""

MODEL_RUN = """
import sys

from sglang_fl.model_run.run import ModelRun

sys.stderr = sys.stdout
ModelRun.load("model", ["--no-such-argument"], 0, 1, 1)
"""

CHECK = """
from sglang_fl.cli import main

main(["check", "--vendor", "fastchip", "--op", "alloc_decode_kernel", "--quick"])
"""


def run(directory: Path, code: str, *arguments: str, platform: str = PLATFORM, hidden: bool = True) -> list[str]:
    """What code prints, with the package installed and the others hidden."""
    write_package(directory, "fastchip", platform, {"sglang_fl.platform": "fastchip:PLATFORM"})
    (directory / "fastchip_sgl_kernel").mkdir()
    (directory / "fastchip_sgl_kernel" / "__init__.py").write_text("from . import imported\n\ndef of_fastchip():\n    return 'provided'\n")
    (directory / "fastchip_kernels.py").write_text(KERNELS)
    for part in ("imported", "spatial"):
        (directory / "fastchip_sgl_kernel" / f"{part}.py").write_text(f"def f():\n    return 'of {part}'\n")
    hide(directory, HIDDEN if hidden else (), DISTRIBUTIONS)
    site = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": site, "XDG_STATE_HOME": str(directory / "state"), "XDG_DATA_HOME": str(directory)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environ)
    return done.stdout.splitlines() or [done.stderr] * 9


def test_the_servers_of_our_commands_have_them_in_time(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    printed = run(tmp_path, SERVERS, str(tmp_path))
    assert [line for line in printed if line.startswith("-m ")] == ["-m sglang_fl.platform.serve"] * 2, printed


def test_what_is_not_given_says_so_when_it_is_called(tmp_path: Path) -> None:
    parts, provided, sampling, kernel, norm, compiles, of_a_part = run(tmp_path, CALLS)[:7]
    assert parts == "of imported of spatial"
    assert provided == "provided 4 False"
    assert sampling.startswith("SGLang called flashinfer.sampling.top_k_top_p_sampling_from_probs, and flashinfer is not installed")
    target = "sglang.kernels.ops.memory.common:get_last_loc_kernel"
    assert kernel.startswith(f"SGLang launched its Triton kernel {target}") and f"sglang_kernels={{'{target}': " in kernel
    assert norm.startswith("SGLang called sgl_kernel.rmsnorm") and compiles.startswith("SGLang called triton.compile")
    assert of_a_part.startswith("SGLang called sgl_kernel.imported.g")


def test_a_module_that_cannot_stand_in_is_named(tmp_path: Path) -> None:
    (tmp_path / "fastchip_triton.py").write_text("import a_module_that_is_not_there")
    write_package(tmp_path, "broken", BROKEN, {"sglang_fl.platform": "broken:PLATFORM"})
    printed = "\n".join(run(tmp_path, DOCTOR))
    assert "fastchip_triton, which stands in for triton, cannot be imported: ModuleNotFoundError: No module named 'a_module" in printed
    assert "stand_ins['flashinfer']: there is no module 'fastchip_flashinfr'" in printed
    assert "Traceback" not in printed


def test_the_process_of_a_model_run_has_them_in_time(tmp_path: Path) -> None:
    """Otherwise it would not come to SGLang's arguments."""
    assert "unrecognized arguments: --no-such-argument" in "\n".join(run(tmp_path, MODEL_RUN))


def test_a_kernel_that_imports_sglang_can_be_checked(tmp_path: Path) -> None:
    printed = "\n".join(run(tmp_path, CHECK))
    assert "ValueError: reached" in printed and "No module named 'triton'" not in printed


def test_packages_that_are_installed(tmp_path: Path) -> None:
    """They are used if they can be, and if nobody hides them."""
    for package, code in (
        ("sgl_kernel", "import libfast"),
        ("flashinfer", "own = print"),
        ("deep_gemm", "own = 1"),
        ("triton", DRIVERLESS),
    ):
        (tmp_path / f"{package}.py").write_text(code)
    platform = PLATFORM.replace("    sglang_kernels", '    hide_installed=("flashinfer",),\n    sglang_kernels')
    no_driver, not_loaded, hides, used, norm, hidden, kernel = run(tmp_path, INSTALLED, platform=platform, hidden=False)[:7]
    assert no_driver == "triton is installed and finds no driver for this chip"
    why = "sgl_kernel is installed and cannot be imported (ModuleNotFoundError: No module named 'libfast' ("
    assert not_loaded.startswith(why) and norm.startswith(f"SGLang called sgl_kernel.rmsnorm, and {why}")
    assert hides == "flashinfer is hidden by the chip's package" and hidden.startswith(
        "SGLang called flashinfer.own, and flashinfer is hid"
    )
    assert used == "provided 1 False False"
    assert kernel.startswith("SGLang launched its Triton kernel sglang.kernels.ops.memory.common:get_last_loc_kernel")


def test_a_provider_is_taken_as_it_is_and_what_it_cannot_do_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [_finder, *sys.meta_path])

    def provided(package: str, code: str) -> ModuleType:
        (tmp_path / f"of_{package}.py").write_text(code)
        monkeypatch.setitem(_finder.providers, package, f"of_{package}")
        monkeypatch.setitem(_finder.reasons, package, "is not installed")
        monkeypatch.delitem(sys.modules, package, raising=False)
        return importlib.import_module(package)

    assert provided("plain_norm", "rmsnorm = None").rmsnorm is None
    with pytest.raises(ImportError, match="of_ending_norm, which stands in for ending_norm, cannot be imported: SystemExit: 3"):
        provided("ending_norm", "raise SystemExit(3)")
    with pytest.raises(ImportError, match=r"it imports wrapping_norm\.rmsnorm, for which it stands in itself"):
        provided("wrapping_norm", "from wrapping_norm import rmsnorm")


def test_tunes_engine_has_them_in_time(tmp_path: Path) -> None:
    """Otherwise it would not come to SGLang's arguments."""
    assert "unrecognized arguments: --no-such-argument" in "\n".join(run(tmp_path, ENGINE, str(tmp_path)))
