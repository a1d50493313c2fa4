# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: Gemma's and layer norms, GELU and further activations against float64, in CUDA graphs, again and again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import DTYPES, Gelu, Norm, check_activation, check_gemma_rms_norm, check_layer_norm

from sglang_fl.dispatch import OpManager, SelectionPolicy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

#: operator -> the kinds of implementation that a GPU has for it.
KINDS = {
    "gelu_and_mul": ("flagos", "triton", "vendor", "reference"),
    "gemma_rms_norm": ("flagos", "triton", "vendor", "reference"),
    "layer_norm": ("vendor", "reference"),
    "new_gelu": ("flagos", "reference"),
    "quick_gelu": ("reference",),
    "relu2": ("vendor", "reference"),
}
ACTIVATIONS = [(op, kind) for op in ("gelu_and_mul", "new_gelu", "quick_gelu", "relu2") for kind in KINDS[op]]
EVERY = [(op, kind) for op, kinds in KINDS.items() for kind in kinds]
#: What SGLang's and FlashInfer's kernels take.
DTYPES_OF = {("gemma_rms_norm", "vendor"): (torch.bfloat16, torch.float16), ("layer_norm", "vendor"): (torch.bfloat16,)}
SHAPES = [(1, 1024), (0, 64), (33, 80), (4, 7, 512), (3, 5000), (64, 4096), (2048, 8192), (8192, 2048), (7, 16384)]


@pytest.fixture(scope="module")
def manager() -> OpManager:
    return OpManager()


def implementation(manager: OpManager, op: str, kind: str) -> Callable[..., Any]:
    """The implementation of a kind that this machine would run, and no other."""
    plan = manager.plan(op, SelectionPolicy(per_op_order=((op, (kind,)),)))
    assert plan.candidates, plan.describe()
    return plan.candidates[0].function


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def skip_unless_taken(op: str, kind: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES_OF.get((op, kind), DTYPES):
        pytest.skip(f"the {kind} kernel takes no {dtype}, and says so")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS["gemma_rms_norm"])
def test_gemma_rms_norm(manager: OpManager, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    skip_unless_taken("gemma_rms_norm", kind, dtype)
    fn, layer = implementation(manager, "gemma_rms_norm", kind), Norm(drawn(shape[-1:], dtype))
    check_gemma_rms_norm(fn, layer, drawn(shape, dtype), None)
    check_gemma_rms_norm(fn, layer, drawn(shape, dtype), drawn(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS["layer_norm"])
def test_layer_norm(manager: OpManager, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    skip_unless_taken("layer_norm", kind, dtype)
    fn = implementation(manager, "layer_norm", kind)
    layer = Norm(drawn(shape[-1:], torch.float32), bias=drawn(shape[-1:], torch.float32))
    for offset in (0.0, 30.0):
        check_layer_norm(fn, layer, drawn(shape, dtype) + offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("op", "kind"), ACTIVATIONS)
def test_activations(manager: OpManager, op: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fn, x = implementation(manager, op, kind), drawn(shape, dtype) * 4
    step = 32 if torch.cuda.get_device_capability() >= (10, 0) else 16
    width = shape[-1] // 2 if op == "gelu_and_mul" else shape[-1]
    for approximate in ("none", "tanh") if op == "gelu_and_mul" else ("",):
        if kind == "vendor" and width * dtype.itemsize % step:
            with pytest.raises(ValueError, match=f"rows of a multiple of {step} bytes"):
                fn(Gelu(approximate), x)
        else:
            check_activation(fn, op, x, approximate)


@pytest.mark.parametrize(("op", "kind"), EVERY)
def test_views(manager: OpManager, op: str, kind: str) -> None:
    fn, wide = implementation(manager, op, kind), drawn((6, 5, 3 * 64), torch.bfloat16)
    for x in (wide[..., 64:128], wide[:, 0, :64], wide.transpose(0, 1)[..., :64]):
        checked(fn, op, x)


def checked(fn: Callable[..., Any], op: str, x: torch.Tensor) -> None:
    size = x.shape[-1:]
    if op == "gemma_rms_norm":
        check_gemma_rms_norm(fn, Norm(drawn(size, x.dtype)), x, None)
    elif op == "layer_norm":
        check_layer_norm(fn, Norm(drawn(size, torch.float32), bias=drawn(size, torch.float32)), x)
    else:
        check_activation(fn, op, x, "tanh" if op == "gelu_and_mul" else "")


@pytest.mark.parametrize(("op", "kind"), EVERY)
def test_a_graph_replays_with_new_data(manager: OpManager, op: str, kind: str) -> None:
    fn = implementation(manager, op, kind)
    layer: Any = Gelu("tanh") if op == "gelu_and_mul" else Norm(drawn((1024,), torch.bfloat16))
    if op == "layer_norm":
        layer = Norm(drawn((1024,), torch.float32), bias=drawn((1024,), torch.float32))

    def call(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return fn(layer, x, residual) if op == "gemma_rms_norm" else (fn(layer, x),)

    x, residual = drawn((16, 1024), torch.bfloat16), drawn((16, 1024), torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(x.clone(), residual.clone())
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(x, residual)
    for _ in range(3):
        new_x, new_residual = drawn((16, 1024), torch.bfloat16), drawn((16, 1024), torch.bfloat16)
        x.copy_(new_x)
        residual.copy_(new_residual)
        graph.replay()
        assert all(map(torch.equal, got, call(new_x, new_residual)))


@pytest.mark.parametrize("kind", KINDS["gemma_rms_norm"])
def test_the_same_again_is_the_same(manager: OpManager, kind: str) -> None:
    """Bit for bit, in a batch that fills the device: a race between a kernel's threads shows here."""
    fn, layer = implementation(manager, "gemma_rms_norm", kind), Norm(drawn((4096,), torch.bfloat16))
    x = drawn((8192, 4096), torch.bfloat16)
    first: list[torch.Tensor] | None = None
    for _ in range(20):
        got = fn(layer, x.clone(), x.clone())
        first = first or [y.clone() for y in got]
        assert all(map(torch.equal, got, first))


def test_the_tail_of_gelu(manager: OpManager) -> None:
    """SGLang's own kernel is compiled with fast math, whose tanh is too coarse for it."""
    x = torch.cat((-torch.linspace(0, 10, 4096, device="cuda"), torch.ones(4096, device="cuda")))
    for dtype in DTYPES:
        for kind in KINDS["gelu_and_mul"]:
            for approximate in ("none", "tanh"):
                check_activation(implementation(manager, "gelu_and_mul", kind), "gelu_and_mul", x.to(dtype), approximate)
