# SPDX-License-Identifier: Apache-2.0
"""Calls inside graphs (captured and replayed), and compiled by torch.compile."""

from collections.abc import Iterable
from shutil import which
from typing import Any

import torch

from ..utils.graphs import graphs_of
from .cases import Case
from .constants import FAILED, SKIPPED
from .implementation import Implementation, results
from .results import Outcome
from .tensors import refill

_REPLAYS, _WARM_UPS = 3, 3


def graph_capture(impl: Implementation, case: Case, seed: int) -> Outcome:
    """Capture once, replay with new data. A replay must be as accurate as a call."""
    graphs = graphs_of(impl.device)
    if graphs is None:
        return Outcome(SKIPPED, f"{impl.device.type} has no graphs")
    new_graph, capture = graphs
    call = case.draw(seed, impl.device)
    _warm_up(impl, case, seed)
    graph = new_graph()
    try:
        with capture(graph):
            got = results(impl.fn, call)
    except torch.OutOfMemoryError:
        raise  # other workers may have taken the memory
    except Exception as error:
        return impl.failed(f"cannot be captured: {type(error).__name__}: {error}")
    _call_in_between(impl, case, seed)

    def replay(number: int) -> Outcome:
        fresh = case.draw(seed + number, impl.device)
        expected = impl.exact(fresh)
        refill(call, fresh)
        graph.replay()
        impl.synchronize()
        return impl.compare(got, expected, case)

    return _worst((f"replay {number} with new data", replay(number)) for number in range(1, _REPLAYS + 1))


def _warm_up(impl: Implementation, case: Case, seed: int) -> None:
    """Call on a separate stream, as PyTorch requires before a capture."""
    stream = torch.Stream(impl.device) if impl.device.type != "cpu" else None
    for number in range(_WARM_UPS):
        call = case.draw(seed + number, impl.device)
        if stream is None:
            impl.run(call)
        else:
            stream.wait_stream(torch.accelerator.current_stream())
            with stream:
                impl.run(call)
    impl.synchronize()


def _call_in_between(impl: Implementation, case: Case, seed: int) -> None:
    """Call with another size and overwrite freed memory: a graph must not depend on memory that later calls reuse."""
    other = case.draw(seed, impl.device, other=True)
    impl.run(other)
    for x in other.tensors().values():
        [torch.full_like(x, -1) for _ in range(4)]  # four at once, so that more than one freed block is taken
    impl.synchronize()


def compilation(impl: Implementation, case: Case, seed: int) -> Outcome:
    """Compile with torch.compile, and call with one or two numbers of tokens."""
    with impl.compiling():  # it is imported
        backend = compiler_of(impl.device)
        torch.compiler.reset()

        def calls(*args: Any, **named: Any) -> Any:
            """As a model calls it: given the function itself, torch.compile would ignore its ``torch.compiler.disable``."""
            return impl.fn(*args, **named)

        compiled = torch.compile(calls, backend=backend)

    def run(other: bool) -> Outcome:
        call = case.draw(seed, impl.device, other=other)
        expected = impl.exact(call)
        return impl.compare(impl.run(call, compiled), expected, case)

    return _worst((f"compiled by {backend}", run(other)) for other in ((False, True) if case.other else (False,)))


def _worst(outcomes: Iterable[tuple[str, Outcome]]) -> Outcome:
    """The first (when, outcome) that failed, else the one nearest to its bound."""
    worst = Outcome()
    for when, outcome in outcomes:
        if outcome.status == FAILED:
            return Outcome(FAILED, f"{when}: {outcome.message}", outcome.error_ulp, outcome.bound_ulp)
        worst = max(worst, outcome, key=lambda one: one.used)
    return worst


def compiler_of(device: torch.device) -> str:
    """torch.compile's backend: inductor if it can generate code for the device."""
    if device.type == "cpu":
        return "inductor" if which("g++") or which("clang++") else "eager"
    from torch._dynamo.device_interface import get_registered_device_interfaces
    from torch.utils._triton import has_triton

    return "inductor" if has_triton() and device.type in dict(get_registered_device_interfaces()) else "eager"
