# SPDX-License-Identifier: Apache-2.0
"""On an NVIDIA GPU: every implementation against float64, in CUDA graphs, and what it may write."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import DTYPES, Norm, check_rms_norm, check_rotary_embedding, check_silu_and_mul

from sglang_fl.dispatch import OpManager, SelectionPolicy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

KINDS = ("flagos", "triton", "vendor", "reference")
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rms_norm(manager: OpManager, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fn = implementation(manager, "rms_norm", kind)
    if kind == "vendor" and dtype is torch.float32:
        pytest.skip("vendor.cuda's kernel takes no fp32, and says so")
    layer = Norm(drawn(shape[-1:], dtype))
    check_rms_norm(fn, layer, drawn(shape, dtype), None)
    check_rms_norm(fn, layer, drawn(shape, dtype), drawn(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_silu_and_mul(manager: OpManager, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = drawn(shape, dtype) * 4
    fn = implementation(manager, "silu_and_mul", kind)
    if kind == "vendor" and shape[-1] // 2 * dtype.itemsize % 16:
        with pytest.raises(ValueError, match="rows of a multiple of 16 bytes"):
            fn(None, x)
        return
    check_silu_and_mul(fn, x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "heads", "head_dim", "rotary_dim"),
    [(129, 8, 64, 64), (1, 8, 128, 64), (0, 2, 128, 128), (5, 4, 80, 80), (4096, 32, 128, 128)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_rotary_embedding(
    manager: OpManager,
    kind: str,
    num_tokens: int,
    heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    inplace: bool,
    interleaved: bool,
) -> None:
    angles = torch.rand(40960, rotary_dim // 2, device="cuda") * 6.3
    cos, sin = torch.cat((angles.cos(), angles.sin()), -1).chunk(2, -1)
    query, key = drawn((num_tokens, heads, head_dim), dtype), drawn((num_tokens, max(1, heads // 4), head_dim), dtype)
    positions = torch.randint(0, 40960, (num_tokens,), device="cuda")
    fn = implementation(manager, "rotary_embedding", kind)
    check_rotary_embedding(fn, query, key, cos, sin, positions, interleaved, inplace)


@pytest.mark.parametrize("kind", KINDS)
def test_views(manager: OpManager, kind: str) -> None:
    wide = drawn((6, 5, 3 * 64), torch.bfloat16)
    layer = Norm(drawn((64,), torch.bfloat16))
    for x in (wide[..., 64:128], wide[:, 0, :64], wide.transpose(0, 1)[..., :64]):
        check_silu_and_mul(implementation(manager, "silu_and_mul", kind), x)
        check_rms_norm(implementation(manager, "rms_norm", kind), layer, x, None)


@pytest.mark.parametrize("op", ["silu_and_mul", "rms_norm", "rotary_embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_with_new_data(manager: OpManager, kind: str, op: str) -> None:
    fn = implementation(manager, op, kind)
    positions = torch.randint(0, 64, (16,), device="cuda")
    cos, sin = torch.rand(64, 128, device="cuda").chunk(2, -1)
    layer = Norm(drawn((1024,), torch.bfloat16))
    fixed: dict[str, Callable[..., Any]] = {
        "silu_and_mul": lambda x, y: fn(None, x),
        "rms_norm": lambda x, y: fn(layer, x, y),
        "rotary_embedding": lambda x, y: fn(None, x.view(16, 8, 128), y.view(16, 8, 128), cos, sin, positions, False, False),
    }
    call = fixed[op]
    x, y = drawn((16, 1024), torch.bfloat16), drawn((16, 1024), torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(x.clone(), y.clone())
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(x, y)
    for _ in range(3):
        new_x, new_y = drawn((16, 1024), torch.bfloat16), drawn((16, 1024), torch.bfloat16)
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        wanted = call(new_x, new_y)
        for a, b in zip(got if isinstance(got, tuple) else (got,), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_again_is_the_same(manager: OpManager, kind: str) -> None:
    """Bit for bit, in a batch that fills the device: a race between a kernel's threads shows here."""
    query, key = drawn((8192, 64, 128), torch.bfloat16), drawn((8192, 8, 128), torch.bfloat16)
    positions = torch.randint(0, 4096, (8192,), device="cuda")
    cos, sin = torch.rand(4096, 128, device="cuda").chunk(2, -1)
    rotary, norm = implementation(manager, "rotary_embedding", kind), implementation(manager, "rms_norm", kind)
    layer = Norm(drawn((4096,), torch.bfloat16))
    x = drawn((8192, 4096), torch.bfloat16)
    first: list[torch.Tensor] | None = None
    for _ in range(20):
        got = [*rotary(None, query.clone(), key.clone(), cos, sin, positions, False, True), *norm(layer, x.clone(), x.clone())]
        if first is None:
            first = [y.clone() for y in got]
        assert all(map(torch.equal, got, first))


@pytest.mark.parametrize("op", ["rms_norm", "silu_and_mul", "rotary_embedding"])
def test_more_numbers_than_an_int32_counts(manager: OpManager, op: str) -> None:
    """The last rows of a tensor that has more than 2 ** 31 are what they are alone."""
    fn, rows = implementation(manager, op, "triton"), 2**31 // 4096 + 3
    x = torch.randn(64, 4096, device="cuda").to(torch.bfloat16).repeat(rows // 64 + 1, 1)[:rows]
    layer, positions = Norm(drawn((4096,), torch.bfloat16)), torch.arange(rows, device="cuda") % 4096
    cos, sin = torch.rand(4096, 128, device="cuda").chunk(2, -1)

    def call(first: int) -> torch.Tensor:
        if op == "rotary_embedding":
            query = x[first:].view(-1, 32, 128)
            return fn(None, query, query[:, :1].clone(), cos, sin, positions[first:], False, False)[0].view(-1, 4096)
        return fn(layer, x[first:])

    wanted = call(rows - 3)
    assert torch.equal(call(0)[-3:], wanted)
