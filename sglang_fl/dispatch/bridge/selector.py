# SPDX-License-Identifier: Apache-2.0
"""Selects an implementation for a call site: the first in the policy's order that passes its trial."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...trial import TO_TRY_AGAIN, current_guard
from ...trial.graph import capture_and_discard
from ..logger_manager import get_logger
from ..manager import OpManager, is_capturing
from ..policy import SelectionPolicy
from ..types import OpImpl, trial_name
from .socket import Socket

logger = get_logger()

#: A trial that takes this long, in seconds, is worth a line.
_LONG = 2.0


@dataclass(frozen=True)
class Selection:
    """What a policy selects for a call site; ``impl`` is None where it stays with SGLang, with the reason."""

    impl: OpImpl | None
    reason: str = ""
    #: Implementation -> why its trial failed, of those before the selected one.
    failed: Mapping[str, str] = field(default_factory=dict, compare=False)
    #: Implementation -> why it is not used, of those that can run on this device and come before the selected one.
    refused: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def destination(self) -> str:
        return str(self.impl) if self.impl else f"sglang({self.reason})"


class Selector:
    """Selects implementations; remembers the results of trials and which warnings were logged."""

    def __init__(self, manager: OpManager):
        self.manager = manager
        self._trials: dict[tuple[Any, ...], Exception | None] = {}
        self._warned: set[str] = set()

    def select(self, socket: Socket, policy: SelectionPolicy) -> Selection:
        """The first implementation in order that passes its trial.

        Raises:
            RuntimeError: under ``strict``, one failed its trial or ended an earlier start, or there is none.
        """
        plan = self.manager.plan(socket.op, policy)
        refused, failed = dict[str, str](), dict[str, str]()
        for index, impl in enumerate(plan.candidates):
            reason = _unfit(impl, socket)
            if reason is not None:
                if policy.strict and trial_name(impl) in socket.load.excluded:
                    raise RuntimeError(f"sglang-fl: {trial_name(impl)}: {reason} (strict is set, so there is no fallback). {TO_TRY_AGAIN}")
                refused[impl.impl_id] = reason
                continue
            error = self._try(impl, socket)
            if error is None:
                return Selection(impl, "", failed, refused)
            message = f"{socket.op}: {impl.impl_id} failed its trial on {socket.name}: {type(error).__name__}: {error}"
            if policy.strict:
                raise RuntimeError(f"sglang-fl: {message} (strict is set, so there is no fallback)") from error
            failed[impl.impl_id] = f"{type(error).__name__}: {error}"
            refused[impl.impl_id] = f"failed its trial: {failed[impl.impl_id]}"
            following = plan.candidates[index + 1 :]
            self.warn_once(f"{message}; {following[0].impl_id if following else 'SGLang'} is used instead")
        if plan.to_sglang:
            return Selection(None, "policy", failed, refused)
        if socket.load.deterministic:
            return Selection(None, "deterministic mode", failed, refused)
        reasons = "; ".join(f"{what}: {why}" for what, why in {**dict(plan.passed_over), **refused}.items())
        message = f"no implementation of {socket.op} can run for {socket.name} (order {'|'.join(plan.order)}: {reasons})"
        if policy.strict:
            raise RuntimeError(f"sglang-fl: {message}")
        self.warn_once(f"{message}; it stays with SGLang")
        return Selection(None, "no implementation can run", failed, refused)

    def fits(self, impl: OpImpl, socket: Socket) -> bool:
        """Whether it may run there and has passed, or passes, its trial."""
        return _unfit(impl, socket) is None and self._try(impl, socket) is None

    def failed_elsewhere(self, impl: OpImpl, socket: Socket, reason: str) -> None:
        """Another rank's trial failed: it counts here, too."""
        key = _key(impl, socket)
        self._trials[key] = self._trials.get(key) or RuntimeError(reason)

    def _try(self, impl: OpImpl, socket: Socket) -> Exception | None:
        """The trial's error, or None."""
        key = _key(impl, socket)
        if key in self._trials:
            return self._trials[key]
        if not socket.is_tried or is_capturing():
            return None
        try:
            started = time.monotonic()
            with torch.inference_mode(), current_guard().running(trial_name(impl)):
                _run(impl, socket)
            if (took := time.monotonic() - started) >= _LONG:
                logger.log(
                    socket.load.log_level, "sglang-fl: %s: trial of %s took %.0f s, compiling included", socket.op, impl.impl_id, took
                )
        except Exception as error:
            logger.debug("trial of %s on %s", impl.impl_id, socket.name, exc_info=True)
            # Its traceback would keep the layer and the scratch tensors.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            self._trials[key] = error
        else:
            self._trials[key] = None
        return self._trials[key]

    def warn_once(self, message: str) -> None:
        """Log a warning, the first time."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _key(impl: OpImpl, socket: Socket) -> tuple[Any, ...]:
    """Equal if one trial is valid for both; includes the conditions that it runs under."""
    return impl, socket.op, socket.trial_key, socket.load.operators, socket.load.in_graphs


def _run(impl: OpImpl, socket: Socket) -> None:
    """Run a trial under serving conditions: called from Python and, where SGLang captures it, inside a capture too."""
    module = torch.get_device_module(socket.device)
    socket.trial(impl.function)
    module.synchronize()
    if socket.load.in_graphs is None or not socket.bridge.captured:
        return

    def captured(*args: Any, **kwargs: Any) -> Any:
        result = impl.function(*args, **kwargs)
        capture_and_discard(lambda: impl.function(*args, **kwargs), socket.device)
        return result

    with socket.load.in_graphs():
        socket.trial(captured)
        module.synchronize()


def _unfit(impl: OpImpl, socket: Socket) -> str | None:
    """Why an implementation may not be tried at a call site, or None."""
    if trial_name(impl) in socket.load.excluded:
        return f"it crashed or hung in an earlier start: {socket.load.excluded[trial_name(impl)]}"
    if socket.load.deterministic and not impl.batch_invariant:
        return "it is not declared batch-invariant"
    dtypes = impl.dtypes()
    if dtypes is not None and socket.dtype not in dtypes:
        return f"it does not take {socket.dtype}"
    return None
