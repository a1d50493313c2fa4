# SPDX-License-Identifier: Apache-2.0
"""The reference backend against float64, and implementations that are wrong in every known way."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import DTYPES, Norm, check_rms_norm, check_rotary_embedding, check_silu_and_mul, randn
from backend_functions import reference
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPES = [(1, 8), (7, 64), (0, 64), (3, 5, 128), (2, 0, 16), (64, 1024), (2, 4096), (33, 40)]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_and_mul(rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    check_silu_and_mul(reference.silu_and_mul, randn(rng, *shape[:-1], 2 * shape[-1], dtype=dtype, scale=scale))


def test_silu_and_mul_not_contiguous(rng: torch.Generator) -> None:
    check_silu_and_mul(reference.silu_and_mul, randn(rng, 6, 64, dtype=torch.bfloat16)[::2])
    check_silu_and_mul(reference.silu_and_mul, randn(rng, 64, 6, dtype=torch.bfloat16).t())


def test_silu_and_mul_special_values() -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([[inf, -inf, nan, 0.0, -1e30, 1e30]])
    got = reference.silu_and_mul(None, torch.cat([gate, torch.ones_like(gate)], -1))
    expected = torch.nn.functional.silu(gate)
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


def test_silu_and_mul_odd_width() -> None:
    with pytest.raises(ValueError, match="must be even, found 7"):
        reference.silu_and_mul(None, torch.zeros(1, 7))


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(rng: torch.Generator, shape: tuple[int, ...], residual: bool, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    layer = Norm(randn(rng, shape[-1], dtype=weight_dtype))
    x = randn(rng, *shape, dtype=dtype, scale=3)
    check_rms_norm(reference.rms_norm, layer, x, randn(rng, *shape, dtype=dtype, scale=10) if residual else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_small_numbers_depends_on_eps(rng: torch.Generator, dtype: torch.dtype) -> None:
    layer = Norm(randn(rng, 64), eps=1e-6)
    check_rms_norm(reference.rms_norm, layer, randn(rng, 4, 64, dtype=dtype, scale=1e-3), None)
    check_rms_norm(reference.rms_norm, layer, torch.zeros(2, 64, dtype=dtype), None)


def test_rms_norm_not_contiguous(rng: torch.Generator) -> None:
    layer = Norm(randn(rng, 32))
    wide = randn(rng, 4, 3, 64, dtype=torch.bfloat16)
    check_rms_norm(reference.rms_norm, layer, wide[..., :32], wide[..., 32:])
    check_rms_norm(reference.rms_norm, layer, wide.transpose(0, 1)[..., :32], None)


def test_rms_norm_of_another_size() -> None:
    with pytest.raises(ValueError, match="hidden_size is 8, but the last dimension of x is 16"):
        reference.rms_norm(Norm(torch.ones(8)), torch.zeros(1, 16))


def rotary_case(
    rng: torch.Generator, tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, cache: torch.dtype
) -> Any:
    angles = torch.rand(4096, rotary_dim // 2, generator=rng) * 6.3
    halves = torch.cat([angles.cos(), angles.sin()], -1).to(cache).chunk(2, -1)
    query, key = randn(rng, tokens, heads, head_dim, dtype=dtype), randn(rng, tokens, kv_heads, head_dim, dtype=dtype)
    return query, key, *halves, torch.randint(0, 4096, (tokens,), generator=rng)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "rotary_dim"),
    [(1, 4, 2, 64, 64), (0, 4, 2, 64, 64), (17, 3, 3, 80, 80), (5, 8, 1, 128, 64), (2, 2, 2, 96, 24), (64, 2, 1, 256, 256)],
)
def test_rotary_embedding(
    rng: torch.Generator,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    cache: torch.dtype,
    interleaved: bool,
) -> None:
    case = rotary_case(rng, tokens, heads, kv_heads, head_dim, rotary_dim, dtype, cache)
    check_rotary_embedding(reference.rotary_embedding, *case, interleaved)


def test_rotary_embedding_of_slices_and_int32_positions(rng: torch.Generator) -> None:
    query, key, cos, sin, positions = rotary_case(rng, 9, 4, 2, 64, 64, torch.bfloat16, torch.float32)
    qkv = torch.cat([query.flatten(1), key.flatten(1), key.flatten(1)], -1)
    query, key = qkv[:, :256].unflatten(1, (4, 64)), qkv[:, 256:384].unflatten(1, (2, 64))
    assert not query.is_contiguous()
    check_rotary_embedding(reference.rotary_embedding, query, key, cos, sin, positions.int(), False, inplace=True)


def test_rotary_dim_above_head_dim() -> None:
    with pytest.raises(ValueError, match="rotary_dim 128 exceeds head_dim 64"):
        reference.rotary_embedding(
            None, torch.zeros(1, 1, 64), torch.zeros(1, 1, 64), torch.zeros(2, 64), torch.zeros(2, 64), torch.zeros(1, dtype=torch.long)
        )


sizes = st.integers(1, 65)


@settings(max_examples=15, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=3), sizes, st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**31))
def test_any_shape(leading: list[int], width: int, dtype: torch.dtype, residual: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    check_silu_and_mul(reference.silu_and_mul, randn(rng, *leading, 2 * width, dtype=dtype))
    x = randn(rng, *leading, width, dtype=dtype)
    check_rms_norm(reference.rms_norm, Norm(randn(rng, width)), x, randn(rng, *leading, width, dtype=dtype) if residual else None)


def wrong_eps(layer: Norm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return reference.rms_norm(Norm(layer.weight, 1e-3), x, residual)


def residual_dropped(layer: Norm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return (reference.rms_norm(layer, x), x) if residual is not None else reference.rms_norm(layer, x)


def residual_not_added_to_output(layer: Norm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return (reference.rms_norm(layer, x), x + residual) if residual is not None else reference.rms_norm(layer, x)


def norm_in_activation_dtype(layer: Norm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    hidden = x if residual is None else x + residual
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + layer.variance_epsilon) * layer.weight.to(x.dtype)
    return normed if residual is None else (normed, hidden)


def sum_rounded_before_norm(layer: Norm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    if residual is None:
        return reference.rms_norm(layer, x)
    hidden = x + residual
    return reference.rms_norm(layer, hidden), hidden


def norm_writes_x(layer: Norm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    result = reference.rms_norm(layer, x, residual)
    x.zero_()
    return result


@pytest.mark.parametrize(
    ("mistake", "residual"),
    [
        (wrong_eps, False),
        (wrong_eps, True),
        (residual_dropped, True),
        (residual_not_added_to_output, True),
        (norm_in_activation_dtype, False),
        (norm_in_activation_dtype, True),
        (sum_rounded_before_norm, True),
        (norm_writes_x, False),
    ],
)
def test_a_wrong_rms_norm_is_caught(rng: torch.Generator, mistake: Callable[..., Any], residual: bool) -> None:
    dtype = torch.float32 if mistake is wrong_eps else torch.bfloat16
    x, other = randn(rng, 8, 256, dtype=dtype), randn(rng, 8, 256, dtype=dtype)
    layer = Norm(randn(rng, 256))
    check_rms_norm(reference.rms_norm, layer, x.clone(), other.clone() if residual else None)
    with pytest.raises(AssertionError):
        check_rms_norm(mistake, layer, x, other if residual else None)


def test_a_wrong_silu_and_mul_is_caught(rng: torch.Generator) -> None:
    x = randn(rng, 8, 256, dtype=torch.bfloat16)

    def in_bf16(obj: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def halves_swapped(obj: Any, x: torch.Tensor) -> torch.Tensor:
        return reference.silu_and_mul(obj, torch.cat(x.chunk(2, -1)[::-1], -1))

    for mistake in (in_bf16, halves_swapped):
        with pytest.raises(AssertionError):
            check_silu_and_mul(mistake, x)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_wrong_rotary_embedding_is_caught(rng: torch.Generator, interleaved: bool) -> None:
    case = rotary_case(rng, 8, 2, 1, 64, 64, torch.bfloat16, torch.float32)

    def layout_swapped(obj: Any, q: Any, k: Any, c: Any, s: Any, p: Any, layout: bool, inplace: bool) -> Any:
        return reference.rotary_embedding(obj, q, k, c, s, p, not layout, inplace)

    def in_bf16(obj: Any, q: Any, k: Any, c: Any, s: Any, p: Any, layout: bool, inplace: bool) -> Any:
        cos, sin = c.bfloat16()[p].unsqueeze(1), s.bfloat16()[p].unsqueeze(1)

        def embed(x: torch.Tensor) -> torch.Tensor:
            a, b = (x[..., ::2], x[..., 1::2]) if layout else x.chunk(2, -1)
            pair = a * cos - b * sin, b * cos + a * sin
            return torch.stack(pair, -1).flatten(-2) if layout else torch.cat(pair, -1)

        return embed(q), embed(k)

    def turned_the_other_way(obj: Any, q: Any, k: Any, c: Any, s: Any, p: Any, layout: bool, inplace: bool) -> Any:
        return reference.rotary_embedding(obj, q, k, c, -s, p, layout, inplace)

    def one_position_late(obj: Any, q: Any, k: Any, c: Any, s: Any, p: Any, layout: bool, inplace: bool) -> Any:
        return reference.rotary_embedding(obj, q, k, c, s, (p + 1) % len(c), layout, inplace)

    for mistake in (layout_swapped, in_bf16, turned_the_other_way, one_position_late):
        with pytest.raises(AssertionError):
            check_rotary_embedding(mistake, *case, interleaved)


def test_its_first_call_does_not_import_pytorchs_compiler() -> None:
    """Seconds that the check would count as the first case's."""
    program = """
import sys, torch
from sglang_fl.dispatch.backends.reference.reference import BACKEND
BACKEND.function("silu_and_mul")(None, torch.zeros(1, 4))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0
