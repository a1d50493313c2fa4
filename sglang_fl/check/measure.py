# SPDX-License-Identifier: Apache-2.0
"""Runs one implementation on one case and says what came of it."""

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..dispatch.types import Refusal
from .cases import OPERATORS_CHECKED, Call, Case
from .constants import BATCH, COMPILE, FAILED, GRAPH, INPUTS, OK, REFUSED, REPEATS, SERVING, SKIPPED, THREADS
from .exact import Verdict
from .shared_state import random_states, restore, shared_state

#: What an implementation may raise to say that it does not take a call.
REFUSALS = (ValueError, TypeError, NotImplementedError)

_THREADS, _ROUNDS_OF_A_THREAD, _REPEATS, _REPLAYS = 4, 200, 20, 3
#: Calls after one whose results must stay: buffers may take turns.
_LATER = 3
#: The parts of a batch that are run alone: first token, number of tokens.
_PARTS = ((0, 1), (5, 1), (0, 33))
#: Threads end after this many seconds, whatever their rounds.
_COLLIDING = 2.0
#: Rounds of the timing, and how long one of them lasts at least, in seconds.
_ROUNDS, _LEAST = 5, 2e-3

Function = Callable[..., Any]
Results = tuple[torch.Tensor, ...]
Wanted = tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        status: ok, failed, refused or skipped.
        message: why, if it is not ok.
        error_ulp, bound_ulp: see :class:`~sglang_fl.check.exact.Verdict`.
        reference_ulp: the reference's error in the same case.
        time_ratio: its time over the reference's.
        broken: the device may not be usable in this process any more.
    """

    status: str = OK
    message: str = ""
    error_ulp: float | None = None
    bound_ulp: float | None = None
    reference_ulp: float | None = None
    time_ratio: float | None = None
    broken: bool = False


class Wrong(Exception):
    """The implementation does what it may not."""


class Subject:
    """An implementation that is being checked.

    Args:
        fn: called as the operator's signature says.
        reference: the reference's function for the same operator; None: ``fn`` is it.
        writes_inputs: what the implementation declares of a call that raises.
        in_float64: called with True before what is exact is computed, which is not the implementation's time, and with False after.
    """

    def __init__(
        self,
        op: str,
        fn: Function,
        reference: Function | None,
        device: torch.device,
        *,
        writes_inputs: bool = True,
        in_float64: Callable[[bool], None] = lambda begins: None,
    ):
        self.op, self.fn, self.reference, self.device = op, fn, reference, device
        self.writes_inputs = writes_inputs
        self._in_float64 = in_float64

    def check(self, case: Case, seed: int) -> Outcome:
        """Run a case. Nothing that the implementation does, short of ending the process, gets out of here."""
        before = shared_state()
        outcome = self._checked(case, seed)
        changes = restore(before)
        if not changes:
            return outcome
        told = f"it changed what all of the process shares, {', '.join(changes)}"
        return replace(outcome, status=FAILED, message="; ".join(filter(None, (outcome.message, told))))

    def _checked(self, case: Case, seed: int) -> Outcome:
        how = _CHECKS.get(case.check, Subject._accuracy)
        try:
            outcome = how(self, case, seed)
            self._synchronize()
        except Wrong as error:
            return Outcome(FAILED, str(error))
        except Refused as refused:
            # What serving needs must work in the dtype of serving, and nothing may raise for want of tokens.
            must = (case.check == SERVING and case.dtype == "bfloat16") or self._has_no_tokens(case, seed)
            return Outcome(FAILED if must else REFUSED, f"refused: {refused}")
        except Exception as error:
            return Outcome(FAILED, f"raised {type(error).__name__}: {error}", broken=self._is_lost())
        return outcome

    def _has_no_tokens(self, case: Case, seed: int) -> bool:
        tensors = (x for x in case.draw(seed, self.device).inputs.values() if isinstance(x, torch.Tensor))
        return any(not x.numel() for x in tensors)

    def _is_lost(self) -> bool:
        """After an illegal access, or a capture that was cut off, an accelerator may answer nothing in this process."""
        try:
            return float(torch.ones(2, device=self.device).sum()) != 2
        except Exception:
            return True

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _exact(self, call: Call) -> Wanted:
        self._in_float64(True)
        try:
            return OPERATORS_CHECKED[self.op].exact(call)
        finally:
            self._in_float64(False)

    def _run(self, call: Call, fn: Function | None = None) -> Results:
        """Call it as serving does, and see that nothing was written that may not be.

        Raises:
            Refused: it does not take the call, and has left the inputs alone.
            Wrong: it wrote what it may not, or gave back what is no result.
        """
        kept = {name: x.clone() for name, x in call.tensors().items()}
        try:
            got = results(fn or self.fn, call)
            self._synchronize()
        except REFUSALS as error:
            told = f"{type(error).__name__}: {error}"
            written = changed(call, kept, frozenset())
            declared = self.writes_inputs and not isinstance(error, Refusal) and set(written) <= call.may_write
            if written and not declared:
                raise Wrong(f"wrote {', '.join(written)} before it raised {told}") from error
            raise Refused(told) from error
        written = changed(call, kept, call.may_write)
        if written:
            raise Wrong(f"wrote {', '.join(written)}, which it may not")
        return got

    def _judge(self, got: Results, wanted: Wanted, dtype: torch.dtype) -> Verdict:
        """The worst of the results' verdicts."""
        if OPERATORS_CHECKED[self.op].whole:
            return wanted[0].judge(got, dtype, self.device)
        if len(got) != len(wanted):
            return Verdict(problem=f"gave {len(got)} results, not {len(wanted)}: {', '.join(right.name for right in wanted)}")
        found = [right.judge(result, dtype, self.device) for result, right in zip(got, wanted, strict=True)]
        return max(found, key=lambda verdict: (verdict.problem is not None, verdict.used))

    def _judged(self, got: Results, wanted: Wanted, case: Case) -> Outcome:
        verdict = self._judge(got, wanted, getattr(torch, case.dtype))
        return Outcome(FAILED if verdict.problem else OK, verdict.problem or "", verdict.error_ulp, verdict.bound_ulp)

    def _accuracy(self, case: Case, seed: int) -> Outcome:
        call = case.draw(seed, self.device)
        wanted = self._exact(call)
        outcome = self._judged(self._run(call), wanted, case)
        if self.reference is None:
            return Outcome(outcome.status, outcome.message, outcome.error_ulp, outcome.bound_ulp, outcome.error_ulp)
        reference = self._judge(results(self.reference, case.draw(seed, self.device)), wanted, getattr(torch, case.dtype))
        ratio = self._time_ratio(case, seed) if case.check == SERVING and outcome.status == OK else None
        return Outcome(outcome.status, outcome.message, outcome.error_ulp, outcome.bound_ulp, reference.error_ulp, ratio)

    def _time_ratio(self, case: Case, seed: int) -> float:
        """Its time over the reference's: the median of rounds that alternate between the two."""
        assert self.reference is not None
        sides = [(fn, case.draw(seed, self.device)) for fn in (self.fn, self.reference)]
        counts = [max(1, round(_LEAST / self._time(fn, call, 3))) for fn, call in sides]
        ratios = []
        for _ in range(_ROUNDS):
            mine, other = (self._time(fn, call, count) for (fn, call), count in zip(sides, counts, strict=True))
            ratios.append(mine / other)
        return statistics.median(ratios)

    def _time(self, fn: Function, call: Call, count: int) -> float:
        """Seconds a call."""
        arguments, named = call.arguments()
        fn(*arguments, **named)
        self._synchronize()
        start = time.perf_counter()
        for _ in range(count):
            fn(*arguments, **named)
        self._synchronize()
        return max(1e-9, (time.perf_counter() - start) / count)

    def _inputs(self, case: Case, seed: int) -> Outcome:
        """Results lie where they may, and stay what they are when it is called again."""
        call, states = case.draw(seed, self.device), random_states(self.device)
        wanted = self._exact(call)
        got = self._run(call)
        allowed = [call.inputs[name].untyped_storage().data_ptr() for name in call.may_write]
        owned = {x.untyped_storage().data_ptr(): name for name, x in call.tensors().items()}
        for result in got:
            place = result.untyped_storage().data_ptr() if isinstance(result, torch.Tensor) and result.numel() else None
            if place in owned and place not in allowed:
                raise Wrong(f"a result lies in the memory of {owned[place]}")
        outcome = self._judged(got, wanted, case)
        if outcome.status == OK:
            kept = tuple(result.clone() for result in got)
            for later in range(1, _LATER + 1):
                self._run(case.draw(seed + later, self.device))
                if not all(map(same_bits, got, kept)):
                    raise Wrong("a later call changed the results of this one: they are kept in a buffer of its own")
            self._follows_weights(call, case, seed + 1)
            self._follows_inputs(call, case, seed + 2)
            if not all(map(same_bits, states, random_states(self.device))):
                raise Wrong("it changed the state of PyTorch's random number generator, from which sampling draws")
        return outcome

    def _follows_weights(self, call: Call, case: Case, seed: int) -> None:
        """Weights are updated in place while serving; what was made of the former ones must not be used again."""
        fresh = case.draw(seed, self.device)
        new = dict(fresh.layer.named_parameters())
        for name, parameter in call.layer.named_parameters():
            parameter.data.copy_(new[name])
        if new:
            updated = replace(fresh, layer=call.layer)
            wanted = self._exact(updated)
            outcome = self._judged(self._run(updated), wanted, case)
            if outcome.status != OK:
                raise Wrong(f"after the layer's weights were updated in place: {outcome.message}")

    def _follows_inputs(self, call: Call, case: Case, seed: int) -> None:
        """A tensor lies where one lay that is gone; what was made of the former's numbers must not be used for it."""
        fresh = case.draw(seed, self.device)
        wanted = self._exact(fresh)
        refill(call, fresh)
        outcome = self._judged(self._run(call), wanted, case)
        if outcome.status != OK:
            raise Wrong(f"with new numbers in the memory of the former inputs: {outcome.message}")

    def _batch(self, case: Case, seed: int) -> Outcome:
        """The bits of a token's result do not depend on what else is in the batch."""
        tokens_in = OPERATORS_CHECKED[self.op].tokens_in
        if not tokens_in:
            return Outcome(SKIPPED, "declared; tokens depend on each other here, and nothing checks it")
        together = self._run(case.draw(seed, self.device))
        for first, count in _PARTS:
            alone = self._run(case.draw(seed, self.device).of_tokens(first, count, tokens_in))
            for part, whole in zip(alone, together, strict=True):
                if not same_bits(part, whole[first : first + count]):
                    told = f"token {first} has" if count == 1 else f"tokens {first} to {first + count - 1} have"
                    raise Wrong(f"declared batch-invariant: {told} another result alone than among {len(whole)}")
        return Outcome()

    def _repeats(self, case: Case, seed: int) -> Outcome:
        call = case.draw(seed, self.device)
        restore = _restorer(call)
        first: Results | None = None
        for repeat in range(_REPEATS):
            got = self._run(call)
            if first is None:
                first = tuple(result.clone() for result in got)
            elif not all(map(same_bits, got, first)):
                places = sum(int((bits(a) != bits(b)).sum()) for a, b in zip(got, first, strict=True))
                raise Wrong(f"not the same again: call {repeat + 1} of {_REPEATS} differs from the first in {places} numbers")
            restore()
        return Outcome()

    def _threads(self, case: Case, seed: int) -> Outcome:
        """Several threads at once, calls of two sizes; each must get what it gets alone."""
        with _threads_that_collide():
            alone = [
                tuple(x.clone() for x in self._run(case.draw(seed + index, self.device, other=bool(index % 2))))
                for index in range(_THREADS)
            ]
            calls = [case.draw(seed + index, self.device, other=bool(index % 2)) for index in range(_THREADS)]
            start = threading.Barrier(_THREADS)
            problems: list[str] = []
            until = time.monotonic() + _COLLIDING

            def work(index: int) -> None:
                try:
                    restore = _restorer(calls[index])
                    start.wait()
                    for _ in range(_ROUNDS_OF_A_THREAD):
                        got = results(self.fn, calls[index])
                        self._synchronize()
                        if not all(map(same_bits, got, alone[index])):
                            problems.append("another result than alone")
                        if problems or time.monotonic() > until:
                            return
                        restore()
                except BaseException as error:  # SystemExit would end a thread without a word
                    problems.append(f"{type(error).__name__}: {error}")

            threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(_THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if problems:
            raise Wrong(f"in {_THREADS} threads at once: {problems[0]}")
        return Outcome()

    def _graph(self, case: Case, seed: int) -> Outcome:
        """Captured once, replayed with new data; a replay must be as near to float64 as a call."""
        graphs = graphs_of(self.device)
        if graphs is None:
            return Outcome(SKIPPED, f"{self.device.type} has no graphs")
        new_graph, capture = graphs
        call = case.draw(seed, self.device)
        stream = torch.Stream(self.device) if self.device.type != "cpu" else None
        for warm_up in range(3):
            call_before = case.draw(seed + warm_up, self.device)
            if stream is None:
                self._run(call_before)
            else:
                stream.wait_stream(torch.accelerator.current_stream())
                with stream:
                    self._run(call_before)
        self._synchronize()
        graph = new_graph()
        try:
            with capture(graph):
                got = results(self.fn, call)
        except Exception as error:
            return Outcome(FAILED, f"cannot be captured: {type(error).__name__}: {error}", broken=self._is_lost())
        worst = Outcome(error_ulp=None)
        for replay in range(1, _REPLAYS + 1):
            fresh = case.draw(seed + replay, self.device)
            wanted = self._exact(fresh)
            refill(call, fresh)
            graph.replay()
            self._synchronize()
            outcome = self._judged(got, wanted, case)
            if outcome.status == FAILED:
                return Outcome(FAILED, f"replay {replay} with new data: {outcome.message}", outcome.error_ulp, outcome.bound_ulp)
            worst = max(worst, outcome, key=lambda one: Verdict(one.error_ulp, one.bound_ulp).used)
        return worst

    def _compile(self, case: Case, seed: int) -> Outcome:
        backend = compiler_of(self.device)
        torch.compiler.reset()
        compiled = torch.compile(self.fn, backend=backend)
        worst = Outcome()
        for other in (False, True) if case.other else (False,):
            call = case.draw(seed, self.device, other=other)
            wanted = self._exact(call)
            outcome = self._judged(self._run(call, compiled), wanted, case)
            if outcome.status == FAILED:
                return Outcome(FAILED, f"compiled by {backend}: {outcome.message}", outcome.error_ulp, outcome.bound_ulp)
            worst = max(worst, outcome, key=lambda one: Verdict(one.error_ulp, one.bound_ulp).used)
        return worst


class Refused(Exception):
    """The implementation does not take the call."""


_CHECKS: dict[str, Callable[[Subject, Case, int], Outcome]] = {
    INPUTS: Subject._inputs,
    REPEATS: Subject._repeats,
    THREADS: Subject._threads,
    GRAPH: Subject._graph,
    COMPILE: Subject._compile,
    BATCH: Subject._batch,
}


def results(fn: Function, call: Call) -> Results:
    arguments, named = call.arguments()
    got = fn(*arguments, **named)
    # One result is a tensor, not a list of one: the caller does not unpack it.
    several = isinstance(got, (tuple, list)) and len(got) > 1
    returned = [result for result in got if result is not None] if several else [got]
    return (*returned, *(call.inputs[name] for name in call.updated))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The numbers' bits, so that nan equals nan, and 0 is not -0."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def _restorer(call: Call) -> Callable[[], None]:
    """What gives the inputs that may be written their numbers back."""
    kept = {name: call.inputs[name].clone() for name in call.may_write}

    def restore() -> None:
        for name, x in kept.items():
            call.inputs[name].copy_(x)

    return restore


def refill(call: Call, fresh: Call) -> None:
    """Give the tensors of a call the numbers of another's, where they lie."""
    for name, x in call.tensors().items():
        x.copy_(fresh.tensors()[name])


def changed(call: Call, kept: dict[str, torch.Tensor], allowed: frozenset[str]) -> Sequence[str]:
    """The tensors of a call that are not what they were."""
    return [name for name, x in call.tensors().items() if name not in allowed and not same_bits(x, kept[name])]


def graphs_of(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """What makes a graph on the device and what captures into it: ``torch.cuda.CUDAGraph``, ``torch.npu.NPUGraph``, …"""
    module = getattr(torch, device.type, None)
    for name in ("CUDAGraph", f"{device.type.upper()}Graph"):
        if hasattr(module, name) and hasattr(module, "graph"):
            return getattr(module, name), module.graph  # type: ignore[union-attr]
    return None


def compiler_of(device: torch.device) -> str:
    """torch.compile's backend: inductor where it can generate code for the device."""
    from shutil import which

    if device.type == "cpu":
        return "inductor" if which("g++") or which("clang++") else "eager"
    from torch._dynamo.device_interface import get_registered_device_interfaces
    from torch.utils._triton import has_triton

    return "inductor" if has_triton() and device.type in dict(get_registered_device_interfaces()) else "eager"


@contextmanager
def _threads_that_collide() -> Iterator[None]:
    """Python hands over between threads as often as it can, and PyTorch adds none to them, so that what is not safe shows soon."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)
