# SPDX-License-Identifier: Apache-2.0
"""The contract: results stay valid, repeat, and depend neither on threads nor on the batch."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from .cases import OPERATORS_CHECKED, Call, Case
from .constants import OK, SKIPPED
from .implementation import Expected, Implementation, Results, Violation, results
from .results import Outcome
from .shared_state import random_states
from .tensors import bits, refill, restorer, same_bits

_THREADS, _ROUNDS_OF_A_THREAD, _REPEATS = 4, 200, 20
#: Threads stop after this many seconds.
_THREADS_LIMIT = 2.0
#: Results must stay valid for this many later calls: an implementation may cycle through buffers.
_LATER_CALLS = 3
#: The parts of a batch that run alone: first token, number of tokens.
_PARTS = ((0, 1), (5, 1), (0, 33))


def inputs_and_results(impl: Implementation, case: Case, seed: int) -> Outcome:
    """Results lie in allowed memory, and later calls do not change them."""
    call, states = case.draw(seed, impl.device), random_states(impl.device)
    expected = impl.exact(call)
    got = impl.run(call)
    _check_memory(call, got)
    outcome = impl.compare(got, expected, case)
    if outcome.status == OK:
        kept = tuple(result.clone() for result in got)
        for later in range(1, _LATER_CALLS + 1):
            again = case.draw(seed + later, impl.device)
            _check_accuracy(impl, again, impl.exact(again), case, f"called again, {later} of {_LATER_CALLS} times")
            if not all(map(same_bits, got, kept)):
                raise Violation("a later call changed the results of this one: they live in a reused buffer")
        _check_updated_weights(impl, call, case, seed + 1)
        _check_reused_memory(impl, call, case, seed + 2)
        if not all(map(same_bits, states, random_states(impl.device))):
            raise Violation("it changed the state of PyTorch's random number generator, which sampling uses")
    return outcome


def _check_memory(call: Call, got: Results) -> None:
    """No result shares memory with a read-only tensor."""
    allowed = [call.inputs[name].untyped_storage().data_ptr() for name in call.may_write]
    owned = {x.untyped_storage().data_ptr(): name for name, x in call.tensors().items()}
    for result in got:
        address = result.untyped_storage().data_ptr() if isinstance(result, torch.Tensor) and result.numel() else None
        if address in owned and address not in allowed:
            raise Violation(f"a result shares memory with {owned[address]}")


def _check_updated_weights(impl: Implementation, call: Call, case: Case, seed: int) -> None:
    """Weights are updated in place while serving. Values derived from the old ones must not be reused."""
    fresh = case.draw(seed, impl.device)
    new = dict(fresh.layer.named_parameters())
    for name, parameter in call.layer.named_parameters():
        parameter.data.copy_(new[name])
    if new:
        updated = replace(fresh, layer=call.layer)
        _check_accuracy(impl, updated, impl.exact(updated), case, "after the layer's weights were updated in place")


def _check_reused_memory(impl: Implementation, call: Call, case: Case, seed: int) -> None:
    """A tensor gets the address of a freed one. Values derived from the old one must not be reused."""
    fresh = case.draw(seed, impl.device)
    expected = impl.exact(fresh)
    refill(call, fresh)
    _check_accuracy(impl, call, expected, case, "with new numbers in the memory of the former inputs")


def _check_accuracy(impl: Implementation, call: Call, expected: Expected, case: Case, when: str) -> None:
    outcome = impl.compare(impl.run(call), expected, case)
    if outcome.status != OK:
        raise Violation(f"{when}: {outcome.message}")


def batch_invariance(impl: Implementation, case: Case, seed: int) -> Outcome:
    """The bits of a token's result do not depend on what else is in the batch."""
    tokens_in = OPERATORS_CHECKED[impl.op].tokens_in
    if not tokens_in:
        return Outcome(SKIPPED, "declared, but not checked: tokens depend on each other here")
    together = impl.run(case.draw(seed, impl.device))
    for first, count in _PARTS:
        alone = impl.run(case.draw(seed, impl.device).of_tokens(slice(first, first + count), tokens_in))
        for part, whole in zip(alone, together, strict=True):
            if not same_bits(part, whole[first : first + count]):
                tokens = f"token {first} has" if count == 1 else f"tokens {first} to {first + count - 1} have"
                raise Violation(f"declared batch-invariant: {tokens} other results alone than in a batch of {len(whole)}")
    return Outcome()


def repeats(impl: Implementation, case: Case, seed: int) -> Outcome:
    """The same call returns the same bits."""
    call = case.draw(seed, impl.device)
    restore = restorer(call)
    first: Results | None = None
    for repeat in range(_REPEATS):
        got = impl.run(call)
        if first is None:
            first = tuple(result.clone() for result in got)
        elif not all(map(same_bits, got, first)):
            count = sum(int((bits(a) != bits(b)).sum()) for a, b in zip(got, first, strict=True))
            raise Violation(f"not deterministic: call {repeat + 1} of {_REPEATS} differs from the first in {count} numbers")
        restore()
    return Outcome()


def threads(impl: Implementation, case: Case, seed: int) -> Outcome:
    """Calls of two sizes from several threads at once. Each must return the result of a single thread."""
    with _colliding_threads():
        alone = [tuple(x.clone() for x in impl.run(_thread_call(impl, case, seed, index))) for index in range(_THREADS)]
        calls = [_thread_call(impl, case, seed, index) for index in range(_THREADS)]
        start = threading.Barrier(_THREADS)
        problems: list[str] = []
        until = time.monotonic() + _THREADS_LIMIT

        def work(index: int) -> None:
            try:
                restore = restorer(calls[index])
                start.wait()
                for _ in range(_ROUNDS_OF_A_THREAD):
                    got = results(impl.fn, calls[index])
                    impl.synchronize()
                    if not all(map(same_bits, got, alone[index])):
                        problems.append("another result than in a single thread")
                    if problems or time.monotonic() > until:
                        return
                    restore()
            except BaseException as error:  # SystemExit would end a thread without a message
                problems.append(f"{type(error).__name__}: {error}")

        started = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(_THREADS)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    if problems:
        raise Violation(f"in {_THREADS} threads at once: {problems[0]}")
    return Outcome()


def _thread_call(impl: Implementation, case: Case, seed: int, index: int) -> Call:
    return case.draw(seed + index, impl.device, other=bool(index % 2))


@contextmanager
def _colliding_threads() -> Iterator[None]:
    """Within the block Python switches threads as often as possible and PyTorch uses one thread, to reveal races."""
    interval, threads_before = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads_before)
