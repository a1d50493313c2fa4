# SPDX-License-Identifier: Apache-2.0
"""Implementation: calls one implementation, and compares its results with float64."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from ..dispatch.types import Refusal
from .cases import OPERATORS_CHECKED, Call, Case
from .constants import COMPILING, DEVICE_LOST, FAILED, IN_FLOAT64, OK, RUNNING
from .exact.judge import Verdict
from .results import Outcome
from .tensors import changed

#: Errors by which an implementation may refuse a call.
REFUSALS = (ValueError, TypeError, NotImplementedError)

Function = Callable[..., Any]
Results = tuple[torch.Tensor, ...]
Expected = tuple[Any, ...]


class Violation(Exception):
    """The implementation violates its operator's contract."""


class Refused(Exception):
    """The implementation refuses the call.

    Attributes:
        counts: how many numbers each of the call's tensors has.
    """

    def __init__(self, message: str, call: Call):
        super().__init__(message)
        self.counts = [x.numel() for x in call.inputs.values() if isinstance(x, torch.Tensor)]


class Implementation:
    """An implementation under check.

    Args:
        fn: the function, with the operator's signature.
        reference: the reference's function for the same operator. None: ``fn`` is the reference.
        writes_inputs: whether a call that raises may have written its inputs, as declared.
        enter: called with each new phase: a first call, which may compile or tune; the exact results; anything else.

    Attributes:
        compiling_s: the seconds of its first calls with new shapes.
    """

    def __init__(
        self,
        op: str,
        fn: Function,
        reference: Function | None,
        device: torch.device,
        *,
        writes_inputs: bool = True,
        enter: Callable[[str], None] = lambda phase: None,
    ):
        self.op, self.fn, self.reference, self.device = op, fn, reference, device
        self.writes_inputs = writes_inputs
        self.compiling_s = 0.0
        self._enter = enter
        self._called: set[Any] = set()

    def exact(self, call: Call) -> Expected:
        """The call's results in float64. Compute them before the call, which may write its inputs."""
        with self._phase(IN_FLOAT64):
            return OPERATORS_CHECKED[self.op].exact(call)

    def run(self, call: Call, fn: Function | None = None) -> Results:
        """Call ``fn`` (default: the implementation), and check that it wrote only what is allowed.

        Raises:
            Refused: it refused the call and wrote nothing.
            Violation: it wrote a read-only tensor.
        """
        kept = {name: x.clone() for name, x in call.tensors().items()}
        try:
            got = self._call(fn or self.fn, call)
        except REFUSALS as error:
            message = f"{type(error).__name__}: {error}"
            written = changed(call, kept, frozenset())
            declared = self.writes_inputs and not isinstance(error, Refusal) and set(written) <= call.may_write
            if written and not declared:
                raise Violation(f"wrote {', '.join(written)} before it raised {message}") from error
            raise Refused(message, call) from error
        written = changed(call, kept, call.may_write)
        if written:
            raise Violation(f"wrote {', '.join(written)}, which is read-only")
        return got

    def _call(self, fn: Function, call: Call) -> Results:
        """Call and wait for the device. A first call may compile or tune."""
        shapes = _shapes(call.arguments())
        first = fn is not self.fn or shapes not in self._called
        self._called.add(shapes)
        with self.compiling() if first else nullcontext():
            got = results(fn, call)
            self.synchronize()
        return got

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """A context with the time limit of compiling instead of that of a call."""
        start = time.monotonic()
        try:
            with self._phase(COMPILING):
                yield
        finally:
            self.compiling_s += time.monotonic() - start

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(RUNNING)

    def verdict(self, got: Results, expected: Expected, case: Case) -> Verdict:
        """The worst of the results' verdicts."""
        with self._phase(IN_FLOAT64):
            return worst(self.op, got, expected, getattr(torch, case.dtype), self.device)

    def compare(self, got: Results, expected: Expected, case: Case) -> Outcome:
        """Compare results with float64."""
        verdict = self.verdict(got, expected, case)
        return Outcome(FAILED if verdict.problem else OK, verdict.problem or "", verdict.error_ulp, verdict.bound_ulp)

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def failed(self, message: str) -> Outcome:
        """The outcome after an error, which may be an illegal access or an aborted capture: does the device still respond?"""
        try:
            responds = float(torch.ones(2, device=self.device).sum()) == 2
        except Exception:
            responds = False
        return Outcome(FAILED if responds else DEVICE_LOST, message)


def _shapes(value: Any) -> Any:
    """The key of a compilation: shapes, strides, dtypes, and what is no tensor, also of a layer and of SGLang's containers."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (SimpleNamespace, torch.nn.Module)):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.items())
    return tuple(map(_shapes, value)) if isinstance(value, (list, tuple)) else str(value)


def worst(op: str, got: Results, expected: Expected, dtype: torch.dtype, device: torch.device | None = None) -> Verdict:
    """The worst of the verdicts on an operator's results."""
    if OPERATORS_CHECKED[op].whole:
        return expected[0].judge(got, dtype, device)
    if len(got) != len(expected):
        return Verdict(problem=f"returned {len(got)} results, not {len(expected)}: {', '.join(right.name for right in expected)}")
    found = [right.judge(result, dtype, device) for result, right in zip(got, expected, strict=True)]
    return max(found, key=lambda verdict: (verdict.problem is not None, verdict.used))


def results(fn: Function, call: Call) -> Results:
    """Call a function. Returns its results, followed by those that it wrote into the inputs."""
    arguments, named = call.arguments()
    got = fn(*arguments, **named)
    if hasattr(got, "_fields"):  # SGLang's StandardTopKOutput and StandardCombineInput, which FlagOS's vendors return
        got = got[:2] if len(got) > 1 else got[0]
    # One result is a tensor, not a list of one: the caller does not unpack it.
    several = isinstance(got, (tuple, list)) and len(got) > 1
    returned = ([result for result in got if result is not None] if several else [got]) if call.returns else []
    return (*returned, *(call.inputs[name] for name in call.updated))
