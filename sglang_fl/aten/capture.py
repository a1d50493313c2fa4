# SPDX-License-Identifier: Apache-2.0
"""Captures one graph with FlagGems's functions in it; what fails is left out on all ranks, and the graph is captured again.

SGLang runs the model twice to warm up, then captures. The ranks wait for each other before each warm-up and, in a prefill graph,
between its segments. So a rank that gives a graph up says so where the others wait next: at such a barrier, or at the end.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..dispatch.manager import is_capturing
from ..distributed.ranks import Ranks
from ..trial.graph import recover
from .agreement import agree, exclude
from .operators import AtenOperators

logger = logging.getLogger("sglang_fl.aten")


class CaptureAbandoned(RuntimeError):
    """Another rank gave this graph up."""


class Capture:
    """The capture of one shape's graph.

    Args:
        shape: SGLang's name for it.
        forward_fn: SGLang's; runs the model.
        capture_one: SGLang's; captures the graph of a function like that, and may be called again.
        pool: the graph's memory pool.
    """

    def __init__(
        self,
        operators: AtenOperators,
        ranks: Ranks,
        shape: Any,
        forward_fn: Callable[[], Any],
        capture_one: Callable[[Callable[[], Any]], Any],
        pool: Any = None,
    ):
        assert operators.trials is not None
        self._operators, self._trials, self._ranks = operators, operators.trials, ranks
        self._shape, self._forward_fn, self._capture_one, self._pool = shape, forward_fn, capture_one, pool
        #: The attempt's result on each rank, (error or None, what failed); None: not known yet.
        self._outcome: list[tuple[str | None, dict[str, str]]] | None = None
        #: An empty graph, after a failure: it keeps the pool usable.
        self._kept: Any = None

    def run(self) -> Any:
        """Capture, as often as it takes.

        Raises:
            RuntimeError: something failed, and ``strict`` is set.
            Exception: SGLang's, where the model fails with PyTorch's own operators, too.
        """
        while True:
            with self._operators.watched():
                result, outcome = self._attempt()
            errors = {rank: error for rank, (error, _) in enumerate(outcome) if error is not None}
            if not errors:
                return result
            failures = [failed for _, failed in outcome]
            exclude(self._operators, self._ranks, failures)
            rank, error = next(iter(errors.items()))
            message = f"the graph of {self._shape} could not be captured (rank {rank}: {error.strip().splitlines()[0]})"
            if not any(failures):
                break
            logger.log(self._ranks.level(logging.WARNING), "%s; capturing it again", message)
        if self._operators.settings.strict:
            raise RuntimeError(f"sglang-fl: {message} (strict is set)")
        logger.log(
            self._ranks.level(logging.WARNING), "%s, and no FlagGems function failed; capturing with PyTorch's own operators", message
        )
        with self._operators.watched(), self._trials.native():
            return self._capture_one(self._forward_fn)

    def at_barrier(self, group: Any) -> bool:
        """SGLang's ranks wait for each other. Returns whether they did so here.

        Raises:
            CaptureAbandoned: a rank has given the graph up.
        """
        if not self._trials.in_capture or group is not self._ranks.group:
            return False
        outcome = self._exchange(None)
        if any(error is not None for error, _ in outcome):
            self._outcome = outcome
            raise CaptureAbandoned
        return True

    def _attempt(self) -> tuple[Any, list[tuple[str | None, dict[str, str]]]]:
        result, error, self._outcome = None, None, None
        self._trials.on_scratch_data = True
        try:
            result = self._capture_one(self._forward)
        except Exception as found:
            if not self._trials.in_capture:
                raise  # in a warm-up: SGLang's own
            error = f"{type(found).__name__}: {found}"
            if torch.accelerator.is_available():
                self._kept = recover(torch.accelerator.current_accelerator() or torch.device("cpu"), self._pool)
        finally:
            self._trials.in_capture = self._trials.on_scratch_data = False
        return result, self._exchange(error) if self._outcome is None else self._outcome

    def _forward(self) -> Any:
        if is_capturing():
            self._trials.in_capture = True
            return self._forward_fn()
        result = self._forward_fn()
        agree(self._operators, self._ranks)
        return result

    def _exchange(self, error: str | None) -> list[tuple[str | None, dict[str, str]]]:
        with self._trials.native():
            return self._ranks.exchange((error, dict(self._trials.failures)))
