# SPDX-License-Identifier: Apache-2.0
"""Which implementation a policy means for a place where SGLang calls an operator: the first that passes its trial there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..logger_manager import get_logger
from ..manager import OpManager, Plan, is_capturing
from ..policy import SelectionPolicy
from ..types import OpImpl
from .base import Forward

logger = get_logger()


@dataclass(frozen=True)
class Choice:
    """What a policy means for a place; ``impl`` is None where it stays with SGLang, with the reason."""

    impl: OpImpl | None
    why: str

    @property
    def destination(self) -> str:
        return str(self.impl) if self.impl else f"sglang({self.why})"


@dataclass(frozen=True)
class Place:
    """Where SGLang calls an operator.

    Attributes:
        name: SGLang's name for what is called there: a layer's class, or a function.
        dtype: of the activations.
        device: where they lie.
        trial_key: equal for places that one trial speaks for.
        trial: runs an implementation as serving will, on scratch tensors, and raises what is wrong with it.
    """

    op: str
    name: str
    dtype: torch.dtype
    device: torch.device
    trial_key: tuple[Any, ...]
    trial: Callable[[Forward], None]


class Chooser:
    """Chooses, and remembers what came of trials and what was warned of.

    Args:
        deterministic: only implementations declared batch-invariant may be used.
    """

    def __init__(self, manager: OpManager, *, deterministic: bool = False):
        self.manager = manager
        self.deterministic = deterministic
        self._trials: dict[tuple[Any, ...], Exception | None] = {}
        self._warned: set[str] = set()

    def choose(self, place: Place, policy: SelectionPolicy) -> Choice:
        """The first implementation in order that passes its trial.

        Raises:
            RuntimeError: under ``strict``, one failed its trial, or there is none.
        """
        plan = self.manager.plan(place.op, policy)
        passed_over = dict(plan.passed_over)
        for index, impl in enumerate(plan.candidates):
            why = self._unfit(impl, place)
            if why is not None:
                passed_over[impl.impl_id] = why
                continue
            error = self._try(impl, place)
            if error is None:
                return Choice(impl, "")
            told = f"{place.op}: {impl.impl_id} failed its trial on {place.name}: {type(error).__name__}: {error}"
            if policy.strict:
                raise RuntimeError(f"sglang-fl: {told} (strict is set, so nothing takes its place)") from error
            passed_over[impl.impl_id] = f"failed its trial: {type(error).__name__}: {error}"
            self._warn_once(f"{told}; {_successor(plan, index)} takes its place")
        if plan.to_sglang:
            return Choice(None, "policy")
        if self.deterministic:
            return Choice(None, "deterministic mode")
        reasons = "; ".join(f"{what}: {why}" for what, why in passed_over.items())
        told = f"no implementation of {place.op} can run for {place.name} (order {'|'.join(plan.order)}: {reasons})"
        if policy.strict:
            raise RuntimeError(f"sglang-fl: {told}")
        self._warn_once(f"{told}; it stays with SGLang")
        return Choice(None, "no implementation can run")

    def fits(self, impl: OpImpl, place: Place) -> bool:
        """Whether it may run there and has passed, or passes, its trial."""
        return self._unfit(impl, place) is None and self._try(impl, place) is None

    def _unfit(self, impl: OpImpl, place: Place) -> str | None:
        if self.deterministic and not impl.batch_invariant:
            return "it is not declared batch-invariant"
        dtypes = impl.dtypes()
        if dtypes is not None and place.dtype not in dtypes:
            return f"it does not take {place.dtype}"
        return None

    def _try(self, impl: OpImpl, place: Place) -> Exception | None:
        """The trial's error, or None."""
        key = (impl, place.op, place.trial_key)
        if key in self._trials:
            return self._trials[key]
        if is_capturing():
            return None
        try:
            with torch.inference_mode():
                place.trial(impl.fn)
            torch.get_device_module(place.device).synchronize()
        except Exception as error:
            logger.debug("trial of %s on %s", impl.impl_id, place.name, exc_info=True)
            # Its traceback would keep the layer and the scratch tensors.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self._trials[key] = error
        else:
            self._trials[key] = None
        return self._trials[key]

    def _warn_once(self, told: str) -> None:
        if told not in self._warned:
            self._warned.add(told)
            logger.warning(told)


def _successor(plan: Plan, index: int) -> str:
    if index + 1 < len(plan.candidates):
        return plan.candidates[index + 1].impl_id
    return "SGLang"
