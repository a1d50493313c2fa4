# SPDX-License-Identifier: Apache-2.0
"""The Ascend backend on a stand-in that takes what the real torch_npu declares. No NPU has run it."""

import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest
import torch
from accuracy import (
    DTYPES,
    Gelu,
    Norm,
    check_activation,
    check_cases,
    check_gemma_rms_norm,
    check_layer_norm,
    check_rms_norm,
    check_rotary_embedding,
    check_silu_and_mul,
)
from backend_functions import Functions
from torch_npu_stand_in import torch_npu

from sglang_fl.check.constants import INPUTS, SERVING, SPECIAL, UNUSUAL
from sglang_fl.config import Settings
from sglang_fl.device import Device
from sglang_fl.dispatch import OpManager, SelectionPolicy
from sglang_fl.dispatch.backends.vendor.ascend.ascend import BACKEND

PACKAGE = "sglang_fl.dispatch.backends.vendor.ascend.impl"
#: Where ``make`` unpacks the wheel; not on any path that Python imports from.
WHEEL = Path(__file__).resolve().parents[3] / ".venv" / "torch_npu"


@pytest.fixture(scope="module")
def backend() -> Iterator[Functions]:
    if not WHEEL.exists():
        pytest.skip("torch_npu's wheel is not there to be read (make .venv/ready-test puts it into .venv/torch_npu)")
    module, library = torch_npu(WHEEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_npu", module)
        for name in ("", ".activation", ".moe", ".normalization", ".rotary"):
            patch.delitem(sys.modules, PACKAGE + name, raising=False)
        yield Functions(BACKEND)
        for name in ("", ".activation", ".moe", ".normalization", ".rotary"):
            sys.modules.pop(PACKAGE + name, None)
    library._destroy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (0, 64), (33, 80), (4, 7, 512), (2, 3, 4, 8), (128,)])
def test_norm_and_activation(backend: Functions, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    layer = Norm(torch.randn(shape[-1]).to(dtype))
    check_rms_norm(backend.rms_norm, layer, x, None)
    check_rms_norm(backend.rms_norm, layer, x, residual)
    check_silu_and_mul(backend.silu_and_mul, x)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (0, 64), (33, 80), (4, 7, 512), (2, 3, 4, 8), (128,)])
def test_gemma_and_layer_norm(backend: Functions, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    layer = Norm(torch.randn(shape[-1]).to(weight_dtype), bias=torch.randn(shape[-1]).to(weight_dtype))
    check_gemma_rms_norm(backend.gemma_rms_norm, layer, x, None)
    check_gemma_rms_norm(backend.gemma_rms_norm, layer, x.clone(), residual)
    check_layer_norm(backend.layer_norm, layer, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (0, 64), (33, 80), (4, 7, 512), (2, 3, 4, 8), (128,)])
def test_activations(backend: Functions, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = 4 * torch.randn(shape).to(dtype)
    for approximate in ("none", "tanh"):
        check_activation(backend.gelu_and_mul, "gelu_and_mul", x, approximate)
    check_activation(backend.new_gelu, "new_gelu", x)
    check_activation(backend.quick_gelu, "quick_gelu", x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(backend: Functions, dtype: torch.dtype) -> None:
    wide, layer = torch.randn(6, 5, 3 * 64).to(dtype), Norm(torch.randn(64, 2).to(dtype)[:, 0])
    for x in (wide[..., 64:128], wide.transpose(0, 1)[..., :64], wide[..., ::3]):
        check_gemma_rms_norm(backend.gemma_rms_norm, layer, x, None)
        check_activation(backend.gelu_and_mul, "gelu_and_mul", x, "tanh")
        check_activation(backend.new_gelu, "new_gelu", x)


def test_what_it_refuses(backend: Functions) -> None:
    with pytest.raises(ValueError, match="must be even, found 5"):
        backend.silu_and_mul(None, torch.ones(3, 5))
    with pytest.raises(TypeError, match="float32"):
        backend.rms_norm(Norm(torch.ones(64)), torch.ones(2, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="hidden_size is 64"):
        backend.rms_norm(Norm(torch.ones(64)), torch.ones(2, 32))
    with pytest.raises(ValueError, match=r"gelu_and_mul: .* must be even, found 5"):
        backend.gelu_and_mul(Gelu("tanh"), torch.ones(3, 5))
    for norm in (backend.gemma_rms_norm, backend.layer_norm):
        with pytest.raises(ValueError, match="hidden_size is 64"):
            norm(Norm(torch.ones(64), bias=torch.ones(64)), torch.ones(2, 32))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cos_dtype", [torch.float32, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (64, 32), (80, 20), (128, 128)])
@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_rotary(
    backend: Functions,
    num_tokens: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    cos_dtype: torch.dtype | None,
    interleaved: bool,
    inplace: bool,
) -> None:
    """With a cache in the activations' dtype, as SGLang has it on NPUs, and in fp32."""
    angles = torch.rand(64, rotary_dim // 2) * 6.3
    cos, sin = torch.cat((angles.cos(), angles.sin()), -1).to(cos_dtype or dtype).chunk(2, -1)
    packed = torch.randn(num_tokens, 3, 2 * head_dim).to(dtype)
    query, key = packed[..., :head_dim], torch.randn(num_tokens, 1, head_dim).to(dtype)
    positions = torch.randint(0, 64, (num_tokens, 2))[:, 0]
    check_rotary_embedding(backend.rotary_embedding, query, key, cos, sin, positions, interleaved, inplace)


def test_rotary_with_sections(backend: Functions) -> None:
    check_cases("mrotary_embedding", backend.mrotary_embedding, SERVING, UNUSUAL, SPECIAL, INPUTS)


@pytest.mark.parametrize(
    ("vendor", "installed", "why"),
    [
        ("ascend", True, None),
        ("nvidia", True, "its operators are for ascend, and this device is nvidia"),
        ("ascend", False, "torch_npu is not installed (pip install torch_npu, of the version that fits PyTorch's)"),
    ],
)
def test_where_it_is_available(monkeypatch: pytest.MonkeyPatch, vendor: str, installed: bool, why: str | None) -> None:
    device = Device(vendor, "npu", "npu", "a test")
    monkeypatch.setattr("sglang_fl.dispatch.types.detect", lambda: device)
    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: (object() if installed else None) if name == "torch_npu" else real(name))
    assert BACKEND.why_unavailable is not None and BACKEND.why_unavailable(Settings(), device) == why
    plan = OpManager().plan("rms_norm", SelectionPolicy("vendor"))
    assert ("vendor.ascend" in [impl.impl_id for impl in plan.candidates]) is (why is None)
