# SPDX-License-Identifier: Apache-2.0
"""Where FlagGems's ATen functions are in force: everywhere, or only while SGLang captures graphs.

A kernel in a graph costs the host nothing at replay. The same kernel called from Python costs 30 to 90 microseconds, and serving waits
for the host. Every runner of SGLang that captures decode or prefill graphs, drafts' included, gets its graph backend from one of two
functions; what these return warms up and captures a graph in ``capture_one``.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

from ..compat import graph_problems, hook, stop_message
from .operators import AtenOperators

logger = logging.getLogger("sglang_fl.aten")

#: Of SGLang; each takes a graph runner and returns its graph backend.
RESOLVERS = (
    "sglang.srt.model_executor.runner_backend.utils.resolve_decode_backend",
    "sglang.srt.model_executor.runner_backend.utils.resolve_prefill_backend",
)

#: What is in force while a graph is captured.
_in_graphs: AtenOperators | None = None
_hooked: list[str] = []


def use_in_graphs(operators: AtenOperators | None) -> None:
    """Have these operators in force while a graph is warmed up and captured; None: no more.

    Raises:
        RuntimeError: SGLang did not take the hook, or captures graphs in another way.
    """
    global _in_graphs
    if operators is not None and graph_problems():
        raise RuntimeError(stop_message(graph_problems()))
    for target in RESOLVERS if operators is not None else ():
        if target in _hooked:
            continue
        if not hook(target, _resolve):
            raise RuntimeError(f"SGLang did not take the hook on {target}: another plugin has hooked it already, or SGLang's log says why")
        _hooked.append(target)
    _in_graphs = operators


def _resolve(own: Callable[[Any], Any], runner: Any) -> Any:
    backend = own(runner)
    backend.capture_one = functools.partial(_capture, backend.capture_one)
    return backend


def _capture(capture_one: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    operators = _in_graphs
    if operators is None:
        return capture_one(*args, **kwargs)
    with operators:
        return capture_one(*args, **kwargs)
