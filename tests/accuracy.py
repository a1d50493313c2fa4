# SPDX-License-Identifier: Apache-2.0
"""Asserts that an implementation's results are as near to float64 as ``sglang_fl.check.exact`` says."""

import secrets
from collections.abc import Callable
from typing import Any

import torch
from backend_functions import reference_of

from sglang_fl.check.cases import cases_of
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import OK
from sglang_fl.check.exact import activation, normalization, rotary
from sglang_fl.check.exact.judge import DTYPES, U32, Exact
from sglang_fl.check.implementation import Implementation

__all__ = [
    "DTYPES",
    "ELEMENTWISE",
    "U32",
    "Gelu",
    "Norm",
    "assert_within",
    "check_activation",
    "check_cases",
    "check_gemma_rms_norm",
    "check_layer_norm",
    "check_rms_norm",
    "check_rotary_embedding",
    "check_silu_and_mul",
]

#: The activations of one input, and their results in float64.
ELEMENTWISE = {"new_gelu": activation.new_gelu, "quick_gelu": activation.quick_gelu, "relu2": activation.relu2}


class Norm:
    """What a norm needs of its layer."""

    def __init__(self, weight: torch.Tensor, eps: float = 1e-6, bias: torch.Tensor | None = None):
        self.weight = weight
        self.variance_epsilon = eps
        self.bias = bias


class Gelu:
    """What a gelu_and_mul needs of its layer."""

    def __init__(self, approximate: str):
        self.approximate = approximate


def randn(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=rng) * scale).to(dtype)


def assert_within(what: str, got: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor, roundings: float) -> None:
    """See :class:`sglang_fl.check.exact.judge.Exact`; the result's dtype may be any."""
    _assert(what, (got,), (Exact("result", exact, terms, roundings),), got.dtype)


def _assert(what: str, got: tuple[torch.Tensor, ...], wanted: tuple[Exact, ...], dtype: torch.dtype) -> None:
    for result, right in zip(got, wanted, strict=True):
        problem = right.judge(result, dtype).problem
        assert problem is None, f"{what}: {problem}"


def check_cases(
    op: str,
    fn: Callable[..., Any],
    *checks: str,
    allowed: frozenset[str] = frozenset({OK}),
    device: str = "cpu",
    dtypes: frozenset[torch.dtype] | None = None,
) -> int:
    """Hold an implementation to the cases of ``sglang-fl check --quick``; how many there were.

    Args:
        checks: the kinds of check.
        allowed: the outcomes that are no failure; REFUSED where a kernel may say that it does not take a call.
        dtypes: what the implementation is given; None: every dtype.
    """
    seed = secrets.randbits(31)
    impl = Implementation(op, fn, reference_of(op), torch.device(device), writes_inputs=True)
    count = 0
    for case in cases_of(op, dtypes, torch.device(device), quick=True):
        if case.check in checks:
            outcome = check_case(impl, case, seed)
            assert outcome.status in allowed, f"{op}, {case.check}, {case.name}, {case.dtype}, seed {seed}: {outcome.message}"
            count += outcome.status == OK
    assert count, f"none of {op}'s cases ran"
    return count


def check_silu_and_mul(fn: Callable[..., Any], x: torch.Tensor) -> None:
    kept, wanted = x.clone(), activation.silu_and_mul(x)
    got = fn(None, x)
    assert torch.equal(x, kept), "silu_and_mul wrote its input"
    _assert("silu_and_mul", (got,), wanted, x.dtype)


def check_activation(fn: Callable[..., Any], op: str, x: torch.Tensor, approximate: str = "") -> None:
    """Of ``gelu_and_mul``, with its kind, or one of :data:`ELEMENTWISE`."""
    kept, wanted = x.clone(), activation.gelu_and_mul(x, approximate) if op == "gelu_and_mul" else ELEMENTWISE[op](x)
    got = fn(Gelu(approximate), x)
    assert torch.equal(x, kept), f"{op} wrote its input"
    _assert(op, (got,), wanted, x.dtype)


def check_rms_norm(fn: Callable[..., Any], layer: Norm, x: torch.Tensor, residual: torch.Tensor | None, op: str = "rms_norm") -> None:
    kept, wanted = x.clone(), getattr(normalization, op)(x, layer.weight, layer.variance_epsilon, residual)
    if residual is None:
        got = (fn(layer, x),)
        assert torch.equal(x, kept), f"{op} wrote x without a residual"
    else:
        got = fn(layer, x, residual)
    _assert(op, got, wanted, x.dtype)


def check_gemma_rms_norm(fn: Callable[..., Any], layer: Norm, x: torch.Tensor, residual: torch.Tensor | None) -> None:
    check_rms_norm(fn, layer, x, residual, "gemma_rms_norm")


def check_layer_norm(fn: Callable[..., Any], layer: Norm, x: torch.Tensor) -> None:
    assert layer.bias is not None
    kept, wanted = x.clone(), normalization.layer_norm(x, layer.weight, layer.bias, layer.variance_epsilon)
    got = fn(layer, x)
    assert torch.equal(x, kept), "layer_norm wrote its input"
    _assert("layer_norm", (got,), wanted, x.dtype)


def check_rotary_embedding(
    fn: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inplace: bool = False,
) -> None:
    kept, wanted = (query.clone(), key.clone()), rotary.rotary_embedding(query, key, cos, sin, positions, interleaved)
    got = fn(None, query, key, cos, sin, positions, interleaved, inplace)
    if not inplace:
        assert torch.equal(query, kept[0]) and torch.equal(key, kept[1]), "rotary_embedding wrote its inputs"
    _assert("rotary_embedding", got, wanted, query.dtype)
