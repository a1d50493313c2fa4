# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend's glue, on stand-ins of its kernels that take what the real ones take and no more."""

import inspect
import math
import sys
from collections.abc import Callable
from importlib import import_module, util
from types import ModuleType
from typing import Any

import pytest
import reference_on_tensors as reference
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
from sglang.srt.layers.rotary_embedding.mrope import MRotaryEmbedding

from sglang_fl.check.cases import Call
from sglang_fl.check.cases.call import Draw
from sglang_fl.check.cases.rotary import Sections
from sglang_fl.check.constants import INPUTS, OK, REFUSED, SERVING, UNUSUAL
from sglang_fl.config import Settings
from sglang_fl.device import Device
from sglang_fl.dispatch import OpManager, OpRegistry, Refusal, SelectionPolicy
from sglang_fl.dispatch.backends.vendor.cuda.cuda import BACKEND
from sglang_fl.dispatch.backends.vendor.cuda.register_ops import register_builtins

PACKAGE = "sglang_fl.dispatch.backends.vendor.cuda.impl"


def norm_kernels(norm: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Without a residual and with one."""

    def plain(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        assert input.dim() == 2 and input.stride(-1) == 1 and input.numel() and weight.dtype == input.dtype
        return norm(input, None, weight, eps)

    def added(input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> None:
        assert input.dim() == residual.dim() == 2 and input.stride(-1) == residual.stride(-1) == 1 and input.numel()
        assert weight.dtype == input.dtype
        normed, total = norm(input, residual, weight, eps)
        input.copy_(normed)
        residual.copy_(total)

    return plain, added


def layernorm(input: torch.Tensor, gemma: torch.Tensor, beta: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """FlashInfer's, whose second parameter is spelled so."""
    assert input.dim() == 2 and input.is_contiguous() and input.numel() and input.dtype == torch.bfloat16
    assert gemma.dtype == beta.dtype == torch.float32 and gemma.is_contiguous() and beta.is_contiguous()
    return reference.layer_norm(input, gemma, beta, eps)


def act_and_mul(vector_bytes: int) -> Any:
    def silu_and_mul(input: torch.Tensor, out: torch.Tensor) -> None:
        assert out.shape[-1] * out.itemsize % vector_bytes == 0 and input.numel()
        out.view(-1, out.shape[-1]).copy_(reference.silu_and_mul(input.view(-1, input.shape[-1])))

    return silu_and_mul


class ActivationModule:
    """SGLang's compiled kernels: 2-D and contiguous, and rows of whole vectors."""

    def run_activation(self, input: torch.Tensor, out: torch.Tensor, name: str) -> None:
        assert input.dim() == out.dim() == 2 and input.is_contiguous() and out.is_contiguous()
        assert out.shape[-1] * out.itemsize % 16 == 0 and input.shape == (out.shape[0], 2 * out.shape[1])
        out.copy_(reference.gelu_and_mul(input, {"gelu": "none", "gelu_tanh": "tanh"}[name]))


def activation_module(dtype: torch.dtype, *, fast_math: bool = True) -> ActivationModule:
    assert not fast_math, "with fast math the tail of GELU is wrong"
    return ActivationModule()


def relu2(input: torch.Tensor, out: torch.Tensor | None = None, *, fast_math: bool = True) -> torch.Tensor:
    assert out is not None and input.numel() * input.itemsize % 16 == 0 and input.numel()
    return out.view(-1, out.shape[-1]).copy_(reference.relu2(input.view(-1, input.shape[-1]))).view(out.shape)


def register_custom_op(fn: Callable[..., Any], *, op_name: str, mutates_args: list[str]) -> Callable[..., Any]:
    assert set(mutates_args) <= set(inspect.signature(fn).parameters)
    return fn


def at_once(dim: int, itemsize: int, is_neox: bool) -> int:
    """The bytes that a thread loads as one, as rope.cuh works them out with its next_pow2."""

    def next_pow2(target: int, factor: int) -> int:
        power = 1
        while power * factor < target:
            power *= 2
        return power

    work_threads = next_pow2(dim, math.gcd(16 // itemsize, dim))
    return next_pow2(dim, 2 * work_threads * (1 + is_neox)) * 2 * itemsize


def apply_rope_inplace(
    q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor, *, is_neox: bool, rope_dim: int = 0
) -> None:
    dim = rope_dim or cos_sin_cache.size(-1)
    assert q.shape[-1] == k.shape[-1] == dim and q.stride(-1) == k.stride(-1) == 1 and q.numel()
    assert cos_sin_cache.dtype == torch.float32 and cos_sin_cache.is_contiguous() and positions.is_contiguous()
    assert q.stride(1) == k.stride(1)
    assert not is_neox or dim % 4 == 0, "it would not compile"
    for x in (q, k):
        vector = at_once(dim, x.itemsize, is_neox)
        assert all(at % vector == 0 for at in (x.data_ptr(), x.stride(0) * x.itemsize, x.stride(1) * x.itemsize)), "misaligned"
    cos, sin = cos_sin_cache.chunk(2, -1)
    rotated = reference.rotary_embedding(q, k, cos, sin, positions, not is_neox)
    q.copy_(rotated[0])
    k.copy_(rotated[1])


def triton_mrope_fused(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    mrope_section: list[int],
    head_size: int,
    rotary_dim: int,
    mrope_interleaved: bool,
    mrope_interleaved_glm: bool,
    is_neox_style: bool,
    axis_map: torch.Tensor | None,
) -> None:
    """It reads positions and the heads of a token as they lie, and computes in the cache's dtype."""
    assert q.dim() == k.dim() == 2 and q.stride(1) == k.stride(1) == 1 and q.shape[0] and q.shape[1] % head_size == 0
    assert cos_sin_cache.is_contiguous() and cos_sin_cache.shape[1] == rotary_dim and cos_sin_cache.dtype == torch.float32
    assert positions.shape == (3, q.shape[0]) and positions.stride(1) == 1 and not mrope_interleaved_glm and axis_map is None
    layer = MRotaryEmbedding(head_size, rotary_dim, 1, 1, is_neox_style, torch.float32, mrope_section, mrope_interleaved)
    layer.cos_sin_cache = cos_sin_cache
    rotated = layer.forward_native(positions, q.float(), k.float())
    q.copy_(rotated[0])
    k.copy_(rotated[1])


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Functions:
    rms, gemma = norm_kernels(reference.rms_norm), norm_kernels(reference.gemma_rms_norm)
    modules: dict[str, dict[str, Any]] = {
        "flashinfer.norm": {"layernorm": layernorm},
        "sgl_kernel": {
            "rmsnorm": rms[0],
            "fused_add_rmsnorm": rms[1],
            "gemma_rmsnorm": gemma[0],
            "gemma_fused_add_rmsnorm": gemma[1],
            "silu_and_mul": act_and_mul(16),
        },
        "sglang.kernels.ops.activation.activation": {
            "activation_module": activation_module,
            "relu2": relu2,
            "silu_and_mul": act_and_mul(16),
        },
        "sglang.kernels.ops.attention.rope": {"apply_rope_inplace": apply_rope_inplace},
        "sglang.kernels.ops.attention.rotary_triton": {"triton_mrope_fused": triton_mrope_fused},
        "sglang.srt.utils.custom_op": {"register_custom_op": register_custom_op},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in ("activation", "normalization", "rotary"):
        monkeypatch.delitem(sys.modules, f"{PACKAGE}.{name}", raising=False)
    return Functions(BACKEND)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (0, 64), (33, 80), (4, 7, 512), (2, 3, 4, 16), (128,)])
def test_norm_and_activation(backend: Functions, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    layer = Norm(torch.randn(shape[-1]).to(dtype))
    check_rms_norm(backend.rms_norm, layer, x, None)
    check_silu_and_mul(backend.silu_and_mul, x)
    for approximate in ("none", "tanh"):
        check_activation(backend.gelu_and_mul, "gelu_and_mul", x, approximate)
    check_activation(backend.relu2, "relu2", x)
    check_gemma_rms_norm(backend.gemma_rms_norm, layer, x, None)
    check_gemma_rms_norm(backend.gemma_rms_norm, layer, x.clone(), residual.clone())
    check_rms_norm(backend.rms_norm, layer, x, residual)


@pytest.mark.parametrize("shape", [(1, 64), (0, 64), (33, 80), (4, 7, 512), (128,), (2, 33)])
def test_layer_norm(backend: Functions, shape: tuple[int, ...]) -> None:
    layer = Norm(torch.randn(shape[-1]), bias=torch.randn(shape[-1]))
    check_layer_norm(backend.layer_norm, layer, torch.randn(shape).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(backend: Functions, dtype: torch.dtype) -> None:
    wide = torch.randn(6, 5, 3 * 64).to(dtype)
    layer = Norm(torch.randn(64).to(dtype))
    for x in (wide[..., 64:128], wide[:, 0, :64], wide.transpose(0, 2)[:64].transpose(0, 2), wide[..., ::3]):
        check_silu_and_mul(backend.silu_and_mul, x)
        check_activation(backend.gelu_and_mul, "gelu_and_mul", x, "tanh")
        check_activation(backend.relu2, "relu2", x)
        check_layer_norm(backend.layer_norm, Norm(torch.randn(64), bias=torch.randn(64, 2)[:, 0]), x.bfloat16())
        check_gemma_rms_norm(backend.gemma_rms_norm, layer, x, None)
        check_rms_norm(backend.rms_norm, layer, x, None)
        exact = x.double() + x.double()
        normed, total = backend.rms_norm(layer, x.clone(), x.clone())
        assert torch.allclose(total.double(), exact, rtol=1e-2) and normed.shape == x.shape


def test_rows_that_the_kernels_cannot_load_are_refused(backend: Functions) -> None:
    """On a GPU they end in a misaligned address, after which the process can do nothing more."""
    with pytest.raises(ValueError, match=r"rows of a multiple of 16 bytes; 12 torch\.bfloat16 are 24"):
        backend.silu_and_mul(None, torch.randn(3, 2 * 12).bfloat16())
    with pytest.raises(ValueError, match="must be even, found 5"):
        backend.silu_and_mul(None, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"gelu_and_mul: the kernel needs rows of a multiple of 16 bytes; 12 torch\.bfloat16 are 24"):
        backend.gelu_and_mul(Gelu("tanh"), torch.randn(3, 2 * 12).bfloat16())
    with pytest.raises(ValueError, match=r"relu2: the kernel needs rows of a multiple of 16 bytes; 10 torch\.float32 are 40"):
        backend.relu2(None, torch.randn(2, 10))
    with pytest.raises(ValueError, match=r"gelu_and_mul: .* must be even, found 5"):
        backend.gelu_and_mul(Gelu("none"), torch.ones(3, 5))


def test_a_row_too_narrow_for_the_wide_kernel(monkeypatch: pytest.MonkeyPatch, backend: Functions) -> None:
    """Blackwell's loads 32 bytes at once."""
    activation = import_module(f"{PACKAGE}.activation")
    monkeypatch.setattr(activation, "_JIT_BYTES", 32)
    monkeypatch.setattr(activation, "jit_silu_and_mul", act_and_mul(32))
    for size in (8, 16):
        check_silu_and_mul(backend.silu_and_mul, torch.randn(3, 2 * size).bfloat16())


def test_weights_of_another_dtype_are_refused(backend: Functions) -> None:
    """The kernel would read them as what they are not."""
    with pytest.raises(Refusal, match="float32"):
        backend.rms_norm(Norm(torch.ones(64)), torch.ones(2, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="hidden_size is 64"):
        backend.rms_norm(Norm(torch.ones(64)), torch.ones(2, 32))
    with pytest.raises(Refusal, match=r"gemma_rms_norm: with x in torch\.bfloat16 the kernel needs weights in torch\.bfloat16"):
        backend.gemma_rms_norm(Norm(torch.ones(64)), torch.ones(2, 64, dtype=torch.bfloat16))
    with pytest.raises(Refusal, match=r"layer_norm: with x in torch\.bfloat16 the kernel needs weights in torch\.float32"):
        backend.layer_norm(Norm(torch.ones(64).bfloat16(), bias=torch.ones(64).bfloat16()), torch.ones(2, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (64, 32), (80, 20)])
@pytest.mark.parametrize("num_tokens", [0, 1, 17])
@pytest.mark.parametrize("cache", ["halves", "apart"])
def test_rotary(
    backend: Functions, num_tokens: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool, inplace: bool, cache: str
) -> None:
    angles = torch.rand(64, rotary_dim // 2) * 6.3
    cos, sin = torch.cat((angles.cos(), angles.sin()), -1).chunk(2, -1) if cache == "halves" else (angles.cos(), angles.sin())
    packed = torch.randn(num_tokens, 3, 2 * head_dim).to(dtype)
    query, key = packed[..., :head_dim], torch.randn(num_tokens, 1, head_dim).to(dtype)
    positions = torch.randint(0, 64, (num_tokens, 2))[:, 0]
    check_rotary_embedding(backend.rotary_embedding, query, key, cos, sin, positions, interleaved, inplace)


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_that_lie_askew_are_copied(backend: Functions, interleaved: bool) -> None:
    """A slice that begins at an odd place would be an illegal access on a GPU, which ends the process."""
    cos, sin = torch.rand(2, 16, 32)
    packed = torch.randn(3, 4 * 64 + 2).bfloat16()
    query, key = packed[:, 1:129].unflatten(-1, (2, 64)), packed[:, 129:257].unflatten(-1, (2, 64))
    check_rotary_embedding(backend.rotary_embedding, query, key, cos, sin, torch.tensor([5, 0, 9]), interleaved, True)


def test_heads_of_a_size_that_lies_askew_are_refused(backend: Functions) -> None:
    """The first 8 of 10 numbers: the next head begins 20 bytes on."""
    query, cos = torch.ones(2, 3, 10).bfloat16(), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"takes 8 bytes at once, and heads of 10 do not begin at multiples"):
        backend.rotary_embedding(None, query, query.clone(), cos, cos, torch.zeros(2, dtype=torch.int64), False)


@pytest.mark.parametrize("op", ["rms_norm", "gemma_rms_norm", "layer_norm", "rotary_embedding"])
def test_the_cases_of_a_quick_check(backend: Functions, op: str) -> None:
    """In the dtypes that are declared; what a kernel does not take is refused, but nothing that serving does."""
    registry = OpRegistry()
    register_builtins(registry)
    impl = registry.get_implementation(op, "vendor.cuda")
    assert impl is not None
    check_cases(op, getattr(backend, op), SERVING, UNUSUAL, INPUTS, allowed=frozenset({OK, REFUSED}), dtypes=impl.dtypes())


def test_rotary_with_sections(backend: Functions) -> None:
    """Half of the cases have a cache in another dtype, or heads that lie apart, which are refused or copied."""
    check_cases("mrotary_embedding", backend.mrotary_embedding, SERVING, UNUSUAL, INPUTS, allowed=frozenset({OK, REFUSED}))


@pytest.fixture
def sections() -> Call:
    return Sections()(Draw(torch.Generator().manual_seed(3), torch.bfloat16, torch.device("cpu")))


def test_the_kernel_of_sections_is_not_traced(backend: Functions, sections: Call) -> None:
    """Compiled by Inductor, what it writes in place to one of two views would be lost."""
    arguments, _ = sections.arguments()
    kept = {name: x.clone() for name, x in sections.tensors().items()}
    function = backend.mrotary_embedding
    right = [x.clone() for x in function(*arguments)]
    for name, x in sections.tensors().items():
        x.copy_(kept[name])
    assert all(map(torch.equal, torch.compile(function, backend="eager")(*arguments), right))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_by_sections"):
        torch.compile(function, backend="eager", fullgraph=True)(*arguments)


def test_the_kernel_of_sections_counts_in_int32(backend: Functions, sections: Call) -> None:
    far = torch.empty_strided((9, 2, 64), (2**28, 64, 1), device="meta")
    with pytest.raises(Refusal, match="mrotary_embedding: the kernel counts in int32, and 9 rows lie 268435456 numbers apart"):
        backend.mrotary_embedding(sections.layer, sections.inputs["positions"], far, far)


def test_halves_of_one_cache_are_joined_without_a_copy(backend: Functions) -> None:
    joined = import_module(f"{PACKAGE}.rotary").joined
    cache = torch.randn(16, 8)
    cos, sin = cache.chunk(2, -1)
    both = joined(cos, sin)
    assert torch.equal(both, cache) and both.data_ptr() == cache.data_ptr() and joined(cos, sin) is both
    for other_cos, other_sin in ((sin, cos), (cos, cos), (cos[:, :2], cos[:, 2:]), (cos, sin.clone()), (cache[:8, :4], cache[8:, 4:])):
        assert torch.equal(joined(other_cos, other_sin), torch.cat((other_cos, other_sin), -1))


def test_a_cache_of_another_dtype_is_refused(backend: Functions) -> None:
    query, cos = torch.ones(2, 1, 8), torch.ones(4, 4, dtype=torch.bfloat16)
    with pytest.raises(Refusal, match="bfloat16"):
        backend.rotary_embedding(None, query, query.clone(), cos, cos, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("vendor", "installed", "why"),
    [
        ("nvidia", True, None),
        ("thead", True, None),
        ("metax", True, "its kernels are for nvidia and thead, and this device is metax"),
        ("nvidia", False, "sglang-kernel is not installed (uv pip install sglang-kernel)"),
    ],
)
def test_where_it_is_available(monkeypatch: pytest.MonkeyPatch, vendor: str, installed: bool, why: str | None) -> None:
    device = Device(vendor, "cuda", "cuda", "a test")
    monkeypatch.setattr("sglang_fl.dispatch.types.detect", lambda: device)
    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: (object() if installed else None) if name == "sgl_kernel" else real(name))
    assert BACKEND.why_unavailable is not None and BACKEND.why_unavailable(Settings(), device) == why
    manager = OpManager()
    plan = manager.plan("rms_norm", SelectionPolicy("vendor"))
    assert ("vendor.cuda" in [impl.impl_id for impl in plan.candidates]) is (why is None)
    for policy in (
        SelectionPolicy("vendor", deny_vendors=frozenset({vendor})),
        SelectionPolicy("vendor", allow_vendors=frozenset({"ascend"})),
    ):
        assert "vendor.cuda" not in [impl.impl_id for impl in manager.plan("rms_norm", policy).candidates]
    for token in ("vendor:cuda", f"vendor:{vendor}"):
        named = manager.plan("rms_norm", SelectionPolicy(per_op_order=(("rms_norm", (token,)),), allow_vendors=frozenset({vendor})))
        assert ([impl.impl_id for impl in named.candidates] == ["vendor.cuda"]) is (why is None)


@pytest.mark.parametrize("op", ["causal_conv1d_fn", "causal_conv1d_update", "fused_sigmoid_gating_delta_rule_update"])
def test_where_sglang_runs_a_triton_kernel_only_an_order_replaces_it(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: True)
    device = Device("nvidia", "cuda", "cuda", "a test")
    implementation = next(impl for impl in BACKEND.implementations() if impl.op_name == op)
    for prefer in ("flagos", "vendor"):
        assert implementation.why_unavailable(Settings(prefer=prefer), device) == "SGLang's own kernel runs on this device"
    assert implementation.why_unavailable(Settings(op_backends=((op, ("vendor", "sglang")),)), device) is None
