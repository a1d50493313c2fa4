# SPDX-License-Identifier: Apache-2.0
"""Exact results in float64, and the bounds of an implementation's error: the unavoidable rounding.

Notation: ``u(dtype)`` is the unit roundoff, half the distance from 1 to the next number. An operator
that computes in fp32 and rounds once may be off by ``u(dtype)`` of the result, plus a few ``u(fp32)``
of the terms that it summed. Results below the smallest normal number may be off by half the smallest
subnormal. Numbers below fp32's smallest normal one may be flushed to zero, as on many devices.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
U32 = torch.finfo(torch.float32).eps / 2
TINY = torch.finfo(torch.float32).smallest_normal
#: Numbers in a block: a float64 array of them takes 2 MiB.
_BLOCK = 1 << 18


def u(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def summation(n: int) -> float:
    """The number of fp32 roundings in a pairwise or blocked sum of n numbers."""
    return 8 + math.log2(max(2, n))


def exactly(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in float64 on the CPU."""
    return x.detach().cpu().double()


@dataclass(frozen=True)
class Verdict:
    """A comparison of a result with float64.

    Attributes:
        error_ulp: the error of the number nearest to its bound, or furthest beyond it, in ulp of the
            result's dtype at the size of the summed terms. None: nothing to compare.
        bound_ulp: the bound of that number, in the same unit.
        problem: what is wrong, or None.
        unbounded: a number is nan or infinite, and should not be. The error above is one of the others.
    """

    error_ulp: float | None = None
    bound_ulp: float | None = None
    problem: str | None = None
    unbounded: bool = False

    @property
    def used(self) -> float:
        """The error divided by its bound."""
        return -1.0 if self.error_ulp is None or self.bound_ulp is None else self.error_ulp / self.bound_ulp


def _place_of_largest(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(x.argmax()), x.shape))  # torch's imports for seconds


def misfit(name: str, got: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> str | None:
    """Why a result cannot be compared: its type, shape, dtype or device. None if it can."""
    if not isinstance(got, torch.Tensor):
        return f"{name} is {type(got).__name__}, not a tensor"
    if got.shape != shape:
        return f"{name} has shape {tuple(got.shape)}, not {tuple(shape)}"
    if got.dtype != dtype:
        return f"{name} is {got.dtype}, not {dtype}"
    return f"{name} is on {got.device}, not on {device}" if device is not None and got.device.type != device.type else None


@dataclass(frozen=True)
class Same:
    """A result that must equal ``value`` (on the CPU, in the result's dtype): integers, copies, and memory that must not change."""

    name: str
    value: torch.Tensor

    def judge(self, got: torch.Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Verdict:
        problem = misfit(self.name, got, self.value.shape, self.value.dtype, device)
        if problem is not None:
            return Verdict(problem=problem)
        found, right = exactly(got), exactly(self.value)
        wrong = (found != right) & ~(found.isnan() & right.isnan())
        if not wrong.any():
            return Verdict()
        where = tuple(wrong.nonzero()[0].tolist())
        told = f"at {where}: {got[where].item()}, not {self.value[where].item()}"
        return Verdict(problem=f"{self.name}: {int(wrong.sum())} of {wrong.numel()} numbers are wrong; {told}")

    def bound(self, dtype: torch.dtype) -> torch.Tensor:
        """The bound of each number's error: zero."""
        return torch.zeros(self.value.shape, dtype=torch.float64)


@dataclass(frozen=True)
class Exact:
    """A result in float64. An implementation's result is right if, for each number,
    ``|got - value| <= u(dtype) |value| + roundings * u(fp32) * terms + lost``.

    Attributes:
        name: the name of this result of the operator.
        value: float64, computed on the CPU from the same inputs.
        terms: float64, the sum of the absolute values of each number's terms.
        roundings: the number of fp32 roundings between the inputs and the result.
        lost: additional errors: internal underflow, errors propagated from earlier numbers. Infinity: any number is right.
        passed_on: numbers from this index of the last dimension on must equal the input bit for bit.
        dtype: the result's dtype, if it is not that of the activations.
    """

    name: str
    value: torch.Tensor
    terms: torch.Tensor
    roundings: float
    lost: torch.Tensor | float = 0.0
    passed_on: int | None = None
    dtype: torch.dtype | None = None

    def in_shape(self, *shape: int) -> "Exact":
        value, terms, lost = (x.expand(self.value.shape).reshape(shape) for x in (self.value, self.terms, torch.as_tensor(self.lost)))
        return replace(self, value=value, terms=terms, lost=lost, passed_on=None)

    def bound(self, dtype: torch.dtype) -> torch.Tensor:
        """The bound of each number's error."""
        dtype = self.dtype or dtype
        return u(dtype) * self.value.abs() + self.terms * (self.roundings * U32 * (1 + u(dtype))) + (smallest(dtype) + self.lost)

    def judge(self, got: torch.Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Verdict:
        """Compare a result with this one. It must have ``dtype`` (unless this has its own) and ``device``."""
        dtype = self.dtype or dtype
        problem = misfit(self.name, got, self.value.shape, dtype, device)
        if problem or not got.numel():
            return Verdict(problem=problem)
        got = got.cpu()
        verdicts = [part._compare(numbers, dtype) for part, numbers in self._blocks(got)]
        if len(verdicts) > 1 and any(verdict.problem for verdict in verdicts):
            return self._compare(got, dtype)  # which counts all of them
        return max(verdicts, key=lambda verdict: verdict.used)

    def _blocks(self, got: torch.Tensor) -> Iterator[tuple["Exact", torch.Tensor]]:
        """This result and an implementation's in blocks of rows that fit in a processor's cache."""
        shape = got.shape
        if got.numel() <= _BLOCK:
            yield self, got
            return

        def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.expand(shape).reshape(-1, shape[-1]).split(max(1, _BLOCK // shape[-1]))

        lost: Iterable[torch.Tensor | float] = split(self.lost) if isinstance(self.lost, torch.Tensor) else itertools.repeat(self.lost)
        for value, terms, one, numbers in zip(split(self.value), split(self.terms), lost, split(got), strict=False):
            yield replace(self, value=value, terms=terms, lost=one), numbers

    def _compare(self, got: torch.Tensor, dtype: torch.dtype) -> Verdict:
        exact, info, bound = self.value, torch.finfo(dtype), self.bound(dtype)
        found = exactly(got)
        error = (found - exact).abs()
        finite = exact.isfinite()
        right = finite & (error <= bound)
        if not right.all():
            overflows = exact.abs() + bound >= info.max
            right |= finite & overflows & (found == torch.copysign(torch.tensor(math.inf, dtype=torch.float64), exact))
            right |= exact.isnan() & found.isnan()
            right |= exact.isinf() & (found == exact)
            right |= torch.as_tensor(self.lost).isposinf()
        if self.passed_on is not None:
            rest = exact[..., self.passed_on :]
            right[..., self.passed_on :] &= (found[..., self.passed_on :] == rest) | rest.isnan()
        share = torch.where(finite & found.isfinite(), error / bound, -1.0)
        where = _place_of_largest(share)
        problem = None if right.all() else self._problem(found, right, error, bound, dtype)
        unbounded = problem is not None and bool((~right & ~(finite & found.isfinite())).any())
        if share[where] < 0:
            return Verdict(problem=problem, unbounded=unbounded)
        # The spacing of this dtype's numbers at the size of the terms.
        size = torch.maximum(exact[where].abs(), self.terms.expand(exact.shape)[where]).clamp(info.smallest_normal, info.max)
        ulp = torch.exp2(torch.floor(torch.log2(size))) * info.eps
        return Verdict(float(error[where] / ulp), float(bound[where] / ulp), problem, unbounded)

    def _problem(self, found: torch.Tensor, right: torch.Tensor, error: torch.Tensor, bound: torch.Tensor, dtype: torch.dtype) -> str:
        wrong = ~right
        # The worst number: unexpected nan and infinity come first.
        excess = torch.where(wrong, (error / bound).nan_to_num(math.inf, math.inf), -1.0)
        where = _place_of_largest(excess)
        return (
            f"{self.name} ({dtype}): {int(wrong.sum())} of {wrong.numel()} are out of bounds; at {where}: {found[where].item():.9g}, "
            f"exact {self.value[where].item():.9g}, error {error[where].item():.3g}, bound {bound[where].item():.3g}"
        )
