# SPDX-License-Identifier: Apache-2.0
"""What is within a bound and what is not."""

import math
from dataclasses import replace

import pytest
import torch

from sglang_fl.check.exact import judge
from sglang_fl.check.exact.activation import silu_and_mul
from sglang_fl.check.exact.judge import DTYPES, Exact, smallest, u

INF, NAN = math.inf, math.nan


def of(*values: float, roundings: float = 0.0, passed_on: int | None = None) -> Exact:
    value = torch.tensor([values], dtype=torch.float64)
    return Exact("result", value, value.abs().nan_to_num(), roundings, passed_on=passed_on)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_a_place_is_allowed_and_a_whole_one_is_not(dtype: torch.dtype) -> None:
    place = 2 * u(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    verdict = of(1 + 0.499 * place).judge(one, dtype)
    assert verdict.problem is None and verdict.error_ulp == pytest.approx(0.499, rel=1e-6)
    assert verdict.bound_ulp == pytest.approx(0.5, rel=1e-2)
    verdict = of(1 + place).judge(one, dtype)
    assert verdict.problem is not None and verdict.error_ulp == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("exact", "got", "right"),
    [
        (NAN, NAN, True),
        (NAN, 0.0, False),
        (1.0, NAN, False),
        (INF, INF, True),
        (INF, -INF, False),
        (INF, 65504.0, False),
        (INF, NAN, False),
        (1.0, INF, False),
        (70000.0, INF, True),
        (-70000.0, INF, False),
        (70000.0, 65504.0, False),
        (65504.0, INF, True),  # the bound reaches beyond the largest number
        (60000.0, INF, False),
        (0.0, -0.0, True),
    ],
)
def test_nan_and_infinity(exact: float, got: float, right: bool) -> None:
    verdict = of(1.0, exact, roundings=1).judge(torch.tensor([[1.0, got]], dtype=torch.float16), torch.float16)
    assert (verdict.problem is None) == right, verdict


def test_the_worst_is_named() -> None:
    verdict = of(1.0, 2.0, 3.0).judge(torch.tensor([[1.0, 2.5, 3.1]]), torch.float32)
    assert verdict.problem is not None
    assert verdict.problem.startswith("result (torch.float32): 2 of 3 are out of bounds; at (0, 1): 2.5, exact 2, error 0.5")


def test_what_is_passed_on_is_not_rounded() -> None:
    exact = of(1.0, 1.0, passed_on=1)
    nudged = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16).nextafter(torch.full((1, 2), 2.0, dtype=torch.bfloat16))
    assert exact.judge(torch.ones(1, 2, dtype=torch.bfloat16), torch.bfloat16).problem is None
    assert (
        of(1.0 + 0.4 * u(torch.bfloat16), 1.0 + 0.4 * u(torch.bfloat16), passed_on=1)
        .judge(torch.ones(1, 2, dtype=torch.bfloat16), torch.bfloat16)
        .problem
    )
    assert exact.judge(nudged, torch.bfloat16).problem


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_below_those_of_fp32_may_become_zero(dtype: torch.dtype) -> None:
    (exact,) = silu_and_mul(torch.tensor([[1e-39, 1.0]], dtype=dtype))
    assert exact.judge(torch.zeros(1, 1, dtype=dtype), dtype).problem is None
    (exact,) = silu_and_mul(torch.tensor([[1e-7, 1.0]], dtype=dtype))
    if dtype is not torch.float16:
        assert exact.judge(torch.zeros(1, 1, dtype=dtype), dtype).problem is not None


def test_denormals_of_fp16_may_not() -> None:
    x = torch.tensor([[1e-5, 1.0]], dtype=torch.float16)
    assert x[0, 0] > 10 * smallest(torch.float16)
    (exact,) = silu_and_mul(x)
    assert exact.judge(torch.zeros(1, 1, dtype=torch.float16), torch.float16).problem is not None


def test_nothing_to_compare() -> None:
    verdict = Exact("result", torch.zeros(0, 4).double(), torch.zeros(0, 4).double(), 1).judge(torch.zeros(0, 4), torch.float32)
    assert (verdict.problem, verdict.error_ulp) == (None, None)
    assert of(1.0).judge(None, torch.float32).problem == "result is NoneType, not a tensor"  # type: ignore[arg-type]


@pytest.mark.parametrize("lost", ["a number", "of each"])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_result_of_several_blocks_is_judged_as_in_one(lost: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.linspace(-9, 9, 7 * 5 * 6, dtype=torch.float64).reshape(7, 5, 6)
    right = Exact("result", value, value.abs(), 1, 0.0 if lost == "a number" else value.abs() * 1e-9, passed_on=5)
    got = value.float()
    right = replace(right, value=torch.cat((right.value[..., :5], got[..., 5:].double()), -1))
    if wrong:
        got[3, 2, 1] += 1
        got[6, 4, 5] = got[6, 4, 5].nextafter(torch.tensor(10.0))
    whole = right.judge(got, torch.float32)
    monkeypatch.setattr(judge, "_BLOCK", 20)
    assert right.judge(got, torch.float32) == whole
    assert ("2 of 210 are out of bounds; at (3, 2, 1)" in str(whole.problem)) == wrong
