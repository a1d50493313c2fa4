# SPDX-License-Identifier: Apache-2.0
"""The FlagGems backend, as far as a machine without its devices can tell."""

import shutil
import sys
from importlib import import_module, reload
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import reference_on_tensors as reference
import torch
from accuracy import DTYPES, Gelu, Norm, check_activation, check_cases, check_gemma_rms_norm, check_rotary_embedding
from backend_functions import Functions
from flaggems_here import gems

from sglang_fl.check.constants import INPUTS, SERVING, UNUSUAL
from sglang_fl.device import Device
from sglang_fl.dispatch import Refusal
from sglang_fl.dispatch.backends.flaggems import library
from sglang_fl.dispatch.backends.flaggems.flaggems import BACKEND

__all__ = ["gems"]

backend = Functions(BACKEND)


def test_the_installed_flaggems_is_the_one_we_call() -> None:
    assert find_spec("flag_gems") is not None, "the tests' environment has FlagGems"
    assert library.changed_signatures() == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the installed FlagGems's source, to change."""
    spec = find_spec("flag_gems")
    assert spec is not None and spec.origin is not None
    root = tmp_path / "flag_gems"
    for file in {*library._SIGNATURES, *library._NAMES, "runtime/backend/device.py"}:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(spec.origin).parent / file, root / file)
    return root


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("modules/normalization.py", "weight: torch.Tensor, eps: float", "w: torch.Tensor, eps: float", "takes (x, residual, w, eps), not"),
        ("fused/gelu_and_mul.py", "def gelu_and_mul(x, y,", "def gelu_and_mul(gate, up,", "takes (gate, up, approximate), not"),
        (
            "modules/normalization.py",
            "weight: torch.Tensor, eps: float",
            "weight: torch.Tensor, eps: float, mode: int",
            "takes (x, residual, weight, eps, mode), not (x, residual, weight, eps)",
        ),
        ("ops/gelu.py", 'approximate="none"', 'approx="none"', "takes (self, *, approx), not (self, *, approximate)"),
        ("ops/gelu.py", 'def gelu(self, *, approximate="none")', "def gelu(self)", "takes (self), not (self, *, approximate)"),
        ("ops/gelu.py", 'approximate="none")', 'approximate="none", out)', "takes (self, *, approximate, out), not"),
        ("modules/activation.py", "def gems_silu_and_mul", "def gems_swiglu", "there is no gems_silu_and_mul"),
        (
            "runtime/register.py",
            "def register_impl(self, key, fn)",
            "def register_impl(self, name, key, fn)",
            "Register.register_impl takes",
        ),
        ("utils/codegen_config_utils.py", "CODEGEN_COFIGS = {", "CODEGEN_CONFIGS = {", "there is no CODEGEN_COFIGS"),
        ("__init__.py", "FULL_CONFIG_BY_FUNC = {}", "CONFIG = {}", "there is no FULL_CONFIG_BY_FUNC"),
        ("__init__.py", "def enable(", "def enable((", "cannot be read"),
        ("runtime/register.py", "cpp_patched_ops", "patched", "there is no cpp_patched_ops"),
        ("utils/libentry.py", "minor_version", "minor", "there is no minor_version"),
        ("utils/libentry.py", "def run(", "def launch(", "there is no LibEntry.run"),
        ("utils/libentry.py", "3 <= minor_version <= 6", "minor_version in (3, 4, 5, 6)", "which Tritons it knows"),
        ("runtime/backend/device.py", "class DeviceDetector", "class Detector", "there is no DeviceDetector"),
    ],
)
def test_a_flaggems_that_changed_is_told(source: Path, file: str, old: str, new: str, told: str) -> None:
    assert library.changed_signatures(source) == []
    text = (source / file).read_text()
    assert old in text
    (source / file).write_text(text.replace(old, new))
    (problem,) = library.changed_signatures(source)
    assert problem.startswith(f"flag_gems/{file}") and told in problem


def test_newer_flaggems_with_a_device_finder(source: Path) -> None:
    device = source / "runtime/backend/device.py"
    device.rename(device.with_name("device_finder.py"))
    assert library.changed_signatures(source) == []
    device.with_name("device_finder.py").unlink()
    (problem,) = library.changed_signatures(source)
    assert "DeviceDetector is in none of" in problem


@pytest.mark.parametrize("op", ["rms_norm", "gemma_rms_norm"])
def test_its_norms_count_in_int32(gems: ModuleType, op: str) -> None:
    """More would be an illegal access on a GPU, which ends the process."""
    vast = torch.empty(2**21, 1024, device="meta")
    with pytest.raises(Refusal, match=f"{op}: FlagGems's kernel counts in int32, and x has 2147483648 numbers"):
        getattr(backend, op)(Norm(torch.ones(1024)), vast)


@pytest.mark.parametrize("name", ["device", "device_finder"])
def test_the_detector_of_old_and_new_flaggems(gems: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = import_module("flag_gems.runtime.backend.device")
    modules = {"flag_gems.runtime.backend.device": real}
    if name == "device_finder":
        modules = {"flag_gems.runtime.backend.device_finder": SimpleNamespace(DeviceDetector=real.DeviceDetector)}  # type: ignore[dict-item]
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda wanted: modules.get(wanted))
    monkeypatch.setattr(library.importlib, "import_module", lambda wanted: modules[wanted])
    assert library.detector().vendor_name == "nvidia"


@pytest.mark.parametrize(
    ("language", "tensors"),
    [
        (SimpleNamespace(semantic=SimpleNamespace(make_block_ptr=print)), True),
        (SimpleNamespace(semantic=SimpleNamespace(TritonSemantic=SimpleNamespace(make_block_ptr=print))), True),
        (SimpleNamespace(semantic=SimpleNamespace(TritonSemantic=object)), False),
        (SimpleNamespace(), False),
    ],
)
def test_block_pointers_of_old_and_new_triton(language: Any, tensors: bool) -> None:
    assert library.block_pointers_are_tensors(language) is tensors


def test_kernels_are_generated_without_block_pointers_where_triton_has_changed_them(gems: ModuleType) -> None:
    language = import_module("triton.language")
    config = import_module("flag_gems.utils.codegen_config_utils").get_codegen_config()
    assert config.prefer_block_pointer is library.block_pointers_are_tensors(language)


def test_a_kernels_second_launch_hands_over_what_the_first_did(gems: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first goes through Triton, the others through FlagGems's own cache, to a launcher that counts nothing."""
    libentry = import_module("flag_gems.utils.libentry")
    entry = import_module("flag_gems.runtime.backend._nvidia.hopper.ops.mm").mm_kernel_general_host_tma
    params = entry.jit_function.params
    constants = [i for i, param in enumerate(params) if param.is_constexpr]
    assert constants and constants[0] < len(params) - len(constants), "it has run-time arguments behind constants"
    launched: list[tuple[Any, ...]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args: launched.append(args)

    monkeypatch.setattr(libentry.torch_device_fn, "current_device", lambda: 0)
    monkeypatch.setattr(entry, "fn", SimpleNamespace(run=lambda *args, **kwargs: Compiled()))
    monkeypatch.setattr(libentry.triton.runtime, "JITFunction", SimpleNamespace)
    monkeypatch.setattr(entry, "kernel_cache", tuple({} for _ in entry.kernel_cache))
    args = tuple(range(len(params)))
    for _ in range(2):
        entry.run(*args, grid=(1,))
    assert launched == [args]
    monkeypatch.setattr(libentry, "minor_version", 8)
    monkeypatch.setattr(entry, "kernel_cache", tuple({} for _ in entry.kernel_cache))
    for _ in range(2):
        entry.run(*args, grid=(1,))
    assert len(launched[1]) == len(params) - len(constants), "FlagGems itself does not know this Triton yet"


@pytest.mark.parametrize(
    ("source", "minor", "expected"),
    [
        ("if major_version == 3 and 3 <= minor_version <= 6:", 8, 6),
        ("if major_version == 3 and 3 <= minor_version <= 6:", 5, 5),
        ("if major_version == 3 and 3 <= minor_version <= 9:", 8, 8),
        ("another way", 8, 8),
    ],
)
def test_the_triton_that_flaggems_takes_it_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, source: str, minor: int, expected: int
) -> None:
    libentry = SimpleNamespace(LibEntry=SimpleNamespace(run=print), major_version=3, minor_version=minor)
    monkeypatch.setattr(library.inspect, "getsource", lambda _: source)
    library._launch_with_all_arguments(libentry)
    assert libentry.minor_version == expected
    assert ("in a way that sglang-fl does not know" in caplog.text) == (source == "another way")


@pytest.mark.parametrize(
    ("environ", "device", "installed", "why"),
    [
        ({"USE_FLAGGEMS": "0"}, "nvidia", True, None),  # that is for ATen operators alone
        ({}, "cpu", True, "FlagGems does not support cpu"),
        ({}, "thead", True, "FlagGems does not support thead"),
        ({}, "metax", False, "FlagGems is not installed (uv pip install flag_gems)"),
        ({}, "metax", True, None),
    ],
)
def test_when_it_is_available(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], device: str, installed: bool, why: str | None
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sglang_fl.dispatch.types.detect", lambda: Device(device, "cuda", None, "a test"))
    real = find_spec
    monkeypatch.setattr(
        library.importlib.util, "find_spec", lambda name: (object() if installed else None) if name == "flag_gems" else real(name)
    )
    impl = BACKEND.implementations()[0]
    assert impl.why_unavailable() == why and impl.is_available() is (why is None)


def test_asking_whether_it_is_available_imports_nothing() -> None:
    import subprocess

    code = (
        "import sys; from sglang_fl.dispatch import OpManager; m = OpManager(); m.plan('rms_norm'); "
        "print([n for n in ('torch', 'flag_gems', 'sgl_kernel', 'sglang') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def gems_rope_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlagGems's function as it declares itself, in PyTorch: whole heads, last dimension of cos and sin contiguous."""
    assert cos.shape[-1] * 2 == query.shape[-1] and cos.stride(-1) == sin.stride(-1) == 1 and position_ids is not None
    rotated = reference.rotary_embedding(query, key, cos, sin, position_ids, rotary_interleaved)
    if not inplace:
        return rotated
    return query.copy_(rotated[0]), key.copy_(rotated[1])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (64, 32), (80, 20)])
@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_whole_and_partial_rotary(
    gems: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    num_tokens: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    interleaved: bool,
    inplace: bool,
) -> None:
    rotary = import_module("sglang_fl.dispatch.backends.flaggems.impl.rotary")
    monkeypatch.setattr(rotary, "gems_rope_forward", gems_rope_forward)
    angles = torch.rand(64, rotary_dim // 2) * 6.3
    packed = torch.randn(num_tokens, 3, 2 * head_dim).to(dtype)
    query, key = packed[..., :head_dim], torch.randn(num_tokens, 1, head_dim).to(dtype)
    positions = torch.randint(0, 64, (num_tokens,))
    check_rotary_embedding(backend.rotary_embedding, query, key, angles.cos(), angles.sin(), positions, interleaved, inplace)


def test_rotary_with_sections(monkeypatch: pytest.MonkeyPatch, gems: ModuleType) -> None:
    rotary = import_module("sglang_fl.dispatch.backends.flaggems.impl.rotary")
    monkeypatch.setattr(rotary, "gems_rope_forward", gems_rope_forward)
    check_cases("mrotary_embedding", backend.mrotary_embedding, SERVING, UNUSUAL, INPUTS)


def gelu_and_mul(x: torch.Tensor, y: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """FlagGems's function as it declares itself, in PyTorch."""
    return reference.gelu_and_mul(torch.cat((x, y), -1), approximate)


def gelu(self: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    assert approximate == "tanh"
    return reference.new_gelu(self)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(gems: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    activation = import_module("sglang_fl.dispatch.backends.flaggems.impl.activation")
    monkeypatch.setattr(activation, "gems_gelu_and_mul", gelu_and_mul)
    monkeypatch.setattr(activation, "gems_gelu", gelu)
    for shape in ((5, 64), (0, 64), (2, 3, 8), (64,)):
        x = torch.randn(shape).to(dtype)
        for approximate in ("none", "tanh"):
            check_activation(backend.gelu_and_mul, "gelu_and_mul", x, approximate)
        check_activation(backend.new_gelu, "new_gelu", x)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gemma_norm_by_flaggems_norm(
    gems: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    """Its norm takes weights of another dtype than x, so 1 + weight need not be rounded."""
    normalization = import_module("sglang_fl.dispatch.backends.flaggems.impl.normalization")
    monkeypatch.setattr(normalization, "gems_rms_forward", reference.rms_norm)
    x, layer = torch.randn(7, 64).to(dtype), Norm(torch.randn(64).to(weight_dtype))
    check_gemma_rms_norm(backend.gemma_rms_norm, layer, x, None)
    check_gemma_rms_norm(backend.gemma_rms_norm, layer, x, x.clone())


def test_an_odd_width_is_refused(gems: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"gelu_and_mul: .* must be even, found 7"):
        backend.gelu_and_mul(Gelu("tanh"), torch.ones(2, 7))
    with pytest.raises(ValueError, match="must be even, found 7"):
        backend.silu_and_mul(None, torch.ones(2, 7))


def test_the_functions_are_flaggems_own(gems: ModuleType) -> None:
    normalization = reload(import_module("sglang_fl.dispatch.backends.flaggems.impl.normalization"))
    assert normalization.gems_rms_forward is gems.modules.normalization.gems_rms_forward
    activation = reload(import_module("sglang_fl.dispatch.backends.flaggems.impl.activation"))
    assert activation.gems_gelu_and_mul is gems.gelu_and_mul and activation.gems_gelu is gems.gelu
