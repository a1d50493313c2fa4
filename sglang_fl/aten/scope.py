# SPDX-License-Identifier: Apache-2.0
"""Where FlagGems's ATen functions are in force: everywhere, or only while SGLang captures graphs. And where they are tried.

A kernel in a graph costs the host nothing at replay. The same kernel called from Python costs 30 to 90 microseconds, and serving waits
for the host. Every runner of SGLang that captures decode or prefill graphs, drafts' included, gets its graph backend from one of two
functions; what these return warms up and captures a graph in ``capture_one``.

A function is tried at its first call: in a warm-up before a capture, or, with ``flagos_scope: everywhere``, in one of the model's first
passes. At the end of a pass the ranks tell each other what failed, and all leave it to PyTorch.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

from ..compat import graph_problems, hook, refuse, start_problems
from ..distributed.ranks import Ranks
from .agreement import agree
from .capture import Capture
from .captured import Captured
from .operators import AtenOperators

logger = logging.getLogger("sglang_fl.aten")

_UTILS = "sglang.srt.model_executor.runner_backend.utils"
_SCHEDULER = "sglang.srt.managers.scheduler"
#: SGLang's capture of all graphs at the start, of the model and then of its draft.
_START = f"{_SCHEDULER}.Scheduler.init_all_cuda_graphs"
_BARRIER = "sglang.srt.distributed.parallel_state.GroupCoordinator.barrier"
_FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
#: After this many passes without a first call, a model counts as tried.
_QUIET_PASSES = 8

#: The operators in force during a capture, and the capture in progress.
_in_graphs: "tuple[AtenOperators, Ranks] | None" = None
_capture: Capture | None = None
#: What is tried in the model's first passes.
_first_passes: "FirstPasses | None" = None
_hooked: list[str] = []
_captured = Captured()


def use_in_graphs(operators: AtenOperators | None, ranks: Ranks | None = None) -> None:
    """Put these operators in force during the warm-up and capture of graphs; None: stop doing so.

    Raises:
        RuntimeError: SGLang did not take a hook, or captures graphs in another way.
    """
    global _in_graphs, _captured
    ranks = ranks or Ranks()
    _captured = Captured()
    if operators is not None:
        for target, function in RESOLVERS.items():
            _hook(target, function)
        _tell_when_captured()
        if ranks.group is not None:
            _hook(_BARRIER, _barrier)
    _in_graphs = None if operators is None else (operators, ranks)


def try_in_first_passes(operators: AtenOperators | None, ranks: Ranks | None = None) -> None:
    """Try these operators, already in force, until the model's passes call no new ones; None: stop.

    Raises:
        RuntimeError: SGLang did not take a hook, or runs models in another way.
    """
    global _first_passes
    if operators is not None:
        _hook(_FORWARD, _forward)
    _first_passes = None if operators is None else FirstPasses(operators, ranks or Ranks())


class FirstPasses:
    """A model's first passes, in which functions are called for the first time. All ranks make the same ones."""

    def __init__(self, operators: AtenOperators, ranks: Ranks):
        self._operators, self._ranks = operators, ranks
        self._known, self._quiet = 0, 0

    def passed(self) -> bool:
        """A pass is over. Returns whether that was the last one that matters."""
        known = agree(self._operators, self._ranks)
        self._operators.register_passed()
        self._quiet = self._quiet + 1 if known == self._known else 0
        self._known = known
        return self._quiet >= _QUIET_PASSES


def _hook(target: str, function: Callable[..., Any]) -> None:
    refuse(graph_problems())
    if target in _hooked:
        return
    if not hook(target, function):
        raise RuntimeError(f"SGLang did not take the hook on {target}: another plugin has hooked it already, or SGLang's log says why")
    _hooked.append(target)


def _tell_when_captured() -> None:
    """Without a server, as in ``sglang-fl bisect``, there is no such line; nor where another plugin has the hook."""
    if _SCHEDULER in sys.modules and _START not in _hooked and not start_problems() and hook(_START, _all_captured, "after"):
        _hooked.append(_START)


def _all_captured(result: Any, scheduler: Any) -> None:
    if _in_graphs is None or not _in_graphs[0].report.in_graphs:
        return
    level = _in_graphs[1].level(logging.INFO if _captured else logging.WARNING)
    logger.log(level, _captured.describe(has_draft=getattr(scheduler, "draft_worker", None) is not None))


def _resolve_decode(own: Callable[[Any], Any], runner: Any) -> Any:
    return _covered("decode", runner, own(runner))


def _resolve_prefill(own: Callable[[Any], Any], runner: Any) -> Any:
    return _covered("prefill", runner, own(runner))


#: Of SGLang; each takes a graph runner and returns its graph backend.
RESOLVERS = {f"{_UTILS}.resolve_decode_backend": _resolve_decode, f"{_UTILS}.resolve_prefill_backend": _resolve_prefill}


def _covered(phase: str, runner: Any, backend: Any) -> Any:
    own = backend.capture_one

    def capture_one(shape_key: Any, forward_fn: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        result = _capture_one(backend, own, shape_key, forward_fn, *args, **kwargs)
        if _in_graphs is not None:
            _captured.add(phase, runner, shape_key)
        return result

    backend.capture_one = capture_one
    return backend


def _capture_one(backend: Any, own: Callable[..., Any], shape_key: Any, forward_fn: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
    global _capture
    if _in_graphs is None:
        return own(shape_key, forward_fn, *args, **kwargs)
    operators, ranks = _in_graphs
    if (group := getattr(backend, "_tp_group", None)) is not None:  # a draft's ranks may be others than the model's
        ranks = Ranks(group)
    pool = getattr(backend, "_pool", None)
    _capture = Capture(operators, ranks, shape_key, forward_fn, lambda forward: own(shape_key, forward, *args, **kwargs), pool)
    try:
        return _capture.run()
    finally:
        _capture = None


def _barrier(own: Callable[..., Any], group: Any, *args: Any, **kwargs: Any) -> Any:
    if _capture is None or not _capture.at_barrier(group):
        return own(group, *args, **kwargs)
    return None


def _forward(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    global _first_passes
    result = own(*args, **kwargs)
    if _first_passes is not None and _first_passes.passed():
        _first_passes = None
    return result
