# SPDX-License-Identifier: Apache-2.0
"""The reference's Gemma norm, layer norm and further activations against float64, and some that are wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import DTYPES, ELEMENTWISE, Gelu, Norm, check_activation, check_gemma_rms_norm, check_layer_norm, randn
from backend_functions import reference
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(1, 8), (7, 64), (0, 64), (3, 5, 128), (2, 0, 16), (16, 256), (2, 4096), (33, 40)]
GELUS = ("none", "tanh")
INF, NAN = float("inf"), float("nan")


def affine(rng: torch.Generator, size: int, dtype: torch.dtype = torch.float32, eps: float = 1e-6) -> Norm:
    return Norm(randn(rng, size, dtype=dtype), eps, randn(rng, size, dtype=dtype))


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    layer = affine(rng, shape[-1], weight_dtype)
    x, residual = randn(rng, *shape, dtype=dtype, scale=3), randn(rng, *shape, dtype=dtype, scale=10)
    check_gemma_rms_norm(reference.gemma_rms_norm, layer, x, None)
    check_gemma_rms_norm(reference.gemma_rms_norm, layer, x.clone(), residual)
    check_layer_norm(reference.layer_norm, layer, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_numbers_and_numbers_far_from_zero(rng: torch.Generator, dtype: torch.dtype) -> None:
    for x in (
        1e-3 * torch.randn(4, 64, generator=rng),
        1000 + torch.randn(4, 64, generator=rng),
        torch.zeros(2, 64),
        torch.full((2, 64), 7.3),
    ):
        for eps in (1e-6, 1e-2):
            check_gemma_rms_norm(reference.gemma_rms_norm, affine(rng, 64, eps=eps), x.to(dtype), None)
            check_layer_norm(reference.layer_norm, affine(rng, 64, eps=eps), x.to(dtype))


def test_norms_not_contiguous(rng: torch.Generator) -> None:
    wide, layer = randn(rng, 4, 3, 64, dtype=torch.bfloat16), affine(rng, 32)
    check_gemma_rms_norm(reference.gemma_rms_norm, layer, wide[..., :32], wide[..., 32:])
    for x in (wide.transpose(0, 1)[..., :32], wide[..., ::2]):
        check_gemma_rms_norm(reference.gemma_rms_norm, layer, x, None)
        check_layer_norm(reference.layer_norm, layer, x)


@pytest.mark.parametrize("op", ["gemma_rms_norm", "layer_norm"])
def test_norms_of_another_size(rng: torch.Generator, op: str) -> None:
    with pytest.raises(ValueError, match=f"{op}: hidden_size is 8, but the last dimension of x is 16"):
        getattr(reference, op)(affine(rng, 8), torch.zeros(1, 16))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations(rng: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    for op in ELEMENTWISE:
        check_activation(getattr(reference, op), op, randn(rng, *shape, dtype=dtype, scale=scale))
    for approximate in GELUS:
        x = randn(rng, *shape[:-1], 2 * shape[-1], dtype=dtype, scale=scale)
        check_activation(reference.gelu_and_mul, "gelu_and_mul", x, approximate)


def test_activations_not_contiguous(rng: torch.Generator) -> None:
    x = randn(rng, 6, 64, dtype=torch.bfloat16)
    for view in (x[::2], x.t(), x[:, 1:33]):
        for op in ELEMENTWISE:
            check_activation(getattr(reference, op), op, view)
        for approximate in GELUS:
            check_activation(reference.gelu_and_mul, "gelu_and_mul", view, approximate)


def test_the_tail_of_gelu(rng: torch.Generator) -> None:
    """Where 1 + erf cancels."""
    x = -torch.linspace(0, 20, 1024)
    for approximate in GELUS:
        check_activation(reference.gelu_and_mul, "gelu_and_mul", torch.cat((x, torch.ones_like(x))), approximate)
    check_activation(reference.new_gelu, "new_gelu", x)
    check_activation(reference.quick_gelu, "quick_gelu", x)


def test_special_values() -> None:
    x = torch.tensor([INF, NAN, 0.0, 3e38, -3e38] * 4)
    expected = {"new_gelu": [INF, NAN, 0.0, 3e38, 0.0], "quick_gelu": [INF, NAN, 0.0, 3e38, 0.0], "relu2": [INF, NAN, 0.0, INF, 0.0]}
    for op, numbers in expected.items():
        wanted = torch.tensor(numbers * 4)
        assert torch.allclose(getattr(reference, op)(None, x), wanted, equal_nan=True), op
    for approximate in GELUS:
        got = reference.gelu_and_mul(Gelu(approximate), torch.cat((x, torch.ones_like(x))))
        assert torch.allclose(got, torch.tensor(expected["new_gelu"] * 4), equal_nan=True)


@pytest.mark.parametrize("approximate", GELUS)
def test_gelu_and_mul_of_an_odd_width(approximate: str) -> None:
    with pytest.raises(ValueError, match="gelu_and_mul: the last dimension must be even, found 7"):
        reference.gelu_and_mul(Gelu(approximate), torch.zeros(1, 7))


sizes = st.integers(1, 33)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(sizes, min_size=1, max_size=3), sizes, st.sampled_from(DTYPES), st.sampled_from(GELUS), st.booleans(), st.integers(0, 2**31)
)
def test_any_shape(leading: list[int], width: int, dtype: torch.dtype, approximate: str, residual: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x, layer = randn(rng, *leading, width, dtype=dtype), affine(rng, width)
    for op in ELEMENTWISE:
        check_activation(getattr(reference, op), op, x)
    check_activation(reference.gelu_and_mul, "gelu_and_mul", torch.cat((x, x), -1), approximate)
    check_layer_norm(reference.layer_norm, layer, x)
    check_gemma_rms_norm(reference.gemma_rms_norm, layer, x, randn(rng, *leading, width, dtype=dtype) if residual else None)


def weight_without_one(layer: Norm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return reference.rms_norm(layer, x, residual)


def one_added_in_bf16(layer: Norm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return reference.rms_norm(Norm(1 + layer.weight.bfloat16(), layer.variance_epsilon), x, residual)


def sum_rounded_before_norm(layer: Norm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return reference.gemma_rms_norm(layer, x) if residual is None else (reference.gemma_rms_norm(layer, x + residual), x + residual)


@pytest.mark.parametrize("mistake", [weight_without_one, one_added_in_bf16, sum_rounded_before_norm])
def test_a_wrong_gemma_norm_is_caught(rng: torch.Generator, mistake: Callable[..., Any]) -> None:
    x, residual, layer = randn(rng, 8, 256, dtype=torch.bfloat16), randn(rng, 8, 256, dtype=torch.bfloat16), affine(rng, 256)
    check_gemma_rms_norm(reference.gemma_rms_norm, layer, x.clone(), residual.clone())
    with pytest.raises(AssertionError):
        check_gemma_rms_norm(mistake, layer, x, residual)


def test_a_wrong_layer_norm_is_caught(rng: torch.Generator) -> None:
    layer, x = affine(rng, 256), 100 + randn(rng, 8, 256)

    def one_pass(layer: Norm, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.square().mean(-1, keepdim=True) - mean.square()
        return (x - mean) * torch.rsqrt(variance + layer.variance_epsilon) * layer.weight + layer.bias

    def unbiased_variance(layer: Norm, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + layer.variance_epsilon).sqrt() * layer.weight + layer.bias

    for mistake in (one_pass, unbiased_variance):
        with pytest.raises(AssertionError):
            check_layer_norm(mistake, layer, x)
