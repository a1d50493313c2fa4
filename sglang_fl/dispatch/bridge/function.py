# SPDX-License-Identifier: Apache-2.0
"""Between SGLang's functions and operators: where it calls a function and no layer that could be bound.

A function is taken over by an AROUND hook in SGLang's own HookRegistry, which puts it in every module that has imported
the function. That happens once a model that calls it was loaded, and only if the policy moves it: hooks that
``load_plugin`` registered would have SGLang import their targets, seconds' worth, in each of its processes.
"""

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

from ...compat import hook
from ...config import Settings
from ..locks import ForkSafeLock
from ..logger_manager import dispatch_log, get_logger
from ..manager import OpManager
from ..policy import PolicyManager, SelectionPolicy, get_policy, overrides
from ..types import OpImpl
from .base import LEFT_BEFORE_IT_IS_SO, Contexts, Forward, NoContexts, Watched, recorded
from .catalog import FUNCTIONS
from .choice import Choice, Chooser, Place
from .report import BindReport

logger = get_logger()


@dataclass(frozen=True)
class FunctionRoutes:
    """Where a bound function may send a call.

    Attributes:
        fn: the implementation in force, called as the operator's signature says.
        dtypes: the activation dtypes that it takes, None: all. A call in another goes to ``own``.
        own: SGLang's function.
        contexts: tells whether a policy context is open.
        divert: takes the call then, with SGLang's arguments.
        failed: takes a call in which ``fn`` raised: ``failed(error, operator_args, call_sglang)``, where ``call_sglang()`` gives
            what the operator would.
    """

    fn: Forward
    dtypes: frozenset[torch.dtype] | None
    own: Forward
    contexts: Contexts
    divert: Forward
    failed: Callable[[Exception, tuple[Any, ...], Callable[[], Any]], Any]


class FunctionBridge(ABC):
    """Between one function of SGLang and one operator."""

    op: ClassVar[str]

    @property
    def module(self) -> str:
        """The module that defines the function."""
        return FUNCTIONS[self.op][0]

    @property
    def name(self) -> str:
        return FUNCTIONS[self.op][1]

    @abstractmethod
    def sites(self, model: nn.Module) -> set[Any]:
        """What a model calls the function for, equal where one trial speaks for both: it has a ``dtype`` and a ``device``,
        those of the activations. Empty if the model does not call it.
        """

    @abstractmethod
    def trial(self, site: Any, fn: Forward) -> None:
        """Run ``fn`` as serving will, on scratch tensors.

        Raises:
            Exception: what ``fn`` raised, or a TypeError or ValueError that says how its result
                breaks the operator's contract.
        """

    @abstractmethod
    def forward(self, routes: FunctionRoutes) -> Forward:
        """A function that takes SGLang's arguments and gives SGLang's result. Everything that can be settled here is."""

    @abstractmethod
    def hooked(self, log_level: int) -> None:
        """The function was taken over, and nothing has run yet: the moment to watch for SGLang going past it."""


@dataclass
class _Function:
    """A function that models call.

    Attributes:
        own: SGLang's.
        sites: what the models call it for.
        hook: what stands in its place, if anything does.
        unhookable: why nothing can.
    """

    bridge: FunctionBridge
    own: Forward
    sites: set[Any]
    hook: "_Hook | None" = None
    unhookable: str | None = None

    @property
    def place(self) -> Place:
        """All of the sites as one: an implementation must pass its trial on each."""
        sites = tuple(self.sites)

        def trial(fn: Forward) -> None:
            for site in sites:
                self.bridge.trial(site, fn)

        return Place(self.bridge.op, self.bridge.name, sites[0].dtype, sites[0].device, (frozenset(sites),), trial)


class _Hook:
    """What stands in the function's place; ``forward`` takes the calls, or SGLang's function if it is None."""

    __slots__ = ("forward",)

    def __init__(self) -> None:
        self.forward: Forward | None = None

    def around(self, own: Forward, *args: Any, **kwargs: Any) -> Any:
        forward = self.forward
        return own(*args, **kwargs) if forward is None else forward(*args, **kwargs)


class FunctionBinder:
    """One for each process that runs a model."""

    def __init__(
        self,
        bridges: Iterable[FunctionBridge],
        manager: OpManager,
        settings: Settings,
        *,
        deterministic: bool = False,
        log_level: int = logging.INFO,
    ):
        """
        Args:
            deterministic: only implementations declared batch-invariant may be used.
            log_level: for what is told once the model runs.
        """
        self.bridges = tuple(bridges)
        self.manager = manager
        self.settings = settings
        self.chooser = Chooser(manager, deterministic=deterministic)
        self.log_level = log_level
        self._functions: dict[str, _Function] = {}
        self._lock = ForkSafeLock()
        PolicyManager.get_instance().subscribe(self.refresh)

    def bind(self, model: nn.Module, report: BindReport) -> None:
        """Take over the functions that a model calls and that the settings and the policy move.

        Raises:
            RuntimeError: under ``strict``, an implementation failed its trial, there is none, or SGLang did not install the hook.
        """
        log = dispatch_log()
        with self._lock:
            policy = PolicyManager.get_instance().get_global_policy()
            left, taken = self._taken(model)
            choices = [(function, self._choose(function, policy)) for function in taken]
            for function, choice in choices:
                self._functions[function.bridge.op] = function
                self._install(function, choice, strict=policy.strict)
                why = function.unhookable if choice.impl else choice.why
                if why is None:
                    report.add_function(function.bridge.op, function.bridge.name, choice.destination)
                else:
                    left.append((function.bridge, why))
            for bridge, why in left:
                report.add_function(bridge.op, bridge.name, f"sglang({why})")
                log.record(bridge.name, f"sglang({why})")

    def _taken(self, model: nn.Module) -> tuple[list[tuple[FunctionBridge, str]], list[_Function]]:
        """The functions that a model calls: those that stay with SGLang whatever the policy says, with why, and the others."""
        left: list[tuple[FunctionBridge, str]] = []
        taken = []
        for bridge in self.bridges:
            sites = bridge.sites(model)
            if not sites:
                continue
            why = self.settings.why_left({bridge.name})
            known = self._functions.get(bridge.op)
            own = known.own if known else getattr(import_module(bridge.module), bridge.name)
            if why is None and known is None and not _is_called(own, bridge):
                why = "nothing that SGLang has loaded calls it"
            if why is not None:
                left.append((bridge, why))
            elif known is None:
                taken.append(_Function(bridge, own, sites))
            else:
                known.sites |= sites
                taken.append(known)
        return left, taken

    def _choose(self, function: _Function, policy: SelectionPolicy) -> Choice:
        return self.chooser.choose(function.place, policy)

    def _install(self, function: _Function, choice: Choice, *, strict: bool) -> None:
        """Put the choice in the function's place."""
        wanted = choice.impl is not None or bool(overrides.active)
        if wanted and function.hook is None and function.unhookable is None:
            placed = _Hook()
            if hook(f"{function.bridge.module}.{function.bridge.name}", placed.around):
                function.hook = placed
                function.bridge.hooked(self.log_level)
            else:
                function.unhookable = "another plugin has a hook there, or SGLang's log says why it took none"
                told = f"{function.bridge.name} stays with SGLang: {function.unhookable}"
                if strict:
                    raise RuntimeError(f"sglang-fl: {told}")
                logger.warning(told)
        if function.hook is not None:
            function.hook.forward = self._forward(function, choice.impl, watch=True) if wanted else None

    def _forward(self, function: _Function, impl: OpImpl | None, *, watch: bool) -> Forward:
        """``watch``: it gives way to open policy contexts, and its first call is put on record."""
        divert = partial(self._divert, function)
        if impl is None:
            return divert if watch else function.own
        contexts = overrides if watch else NoContexts()
        routes = FunctionRoutes(impl.fn, impl.dtypes(), function.own, contexts, divert, self._failed(function, impl))
        forward = function.bridge.forward(routes)
        if not watch:
            return forward
        watched = Watched(impl.fn)
        return self._recording(function, forward, function.bridge.forward(replace(routes, fn=watched)), watched, str(impl))

    def _recording(self, function: _Function, forward: Forward, telling: Forward, watched: Watched, destination: str) -> Forward:
        """A forward that puts on record where its first calls went, and then gives its place to ``forward``.

        Args:
            telling: the same as ``forward``, with ``watched`` in the implementation's place.
        """
        left = 0

        def first(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if overrides.active or torch.compiler.is_compiling():
                return forward(*args, **kwargs)
            result, is_left = watched.record(function.bridge.name, destination, telling, *args, **kwargs)
            left += is_left
            waits = is_left and left < LEFT_BEFORE_IT_IS_SO
            if not waits and function.hook is not None and function.hook.forward is first:
                function.hook.forward = forward
            return result

        return first

    def _divert(self, function: _Function, *args: Any, **kwargs: Any) -> Any:
        """A call while a policy context is open somewhere: here, or in another thread or task."""
        choice = self._choose(function, get_policy())
        dispatch_log().record(function.bridge.name, choice.destination)
        return self._forward(function, choice.impl, watch=False)(*args, **kwargs)

    def _failed(self, function: _Function, impl: OpImpl) -> Callable[[Exception, tuple[Any, ...], Callable[[], Any]], Any]:
        def failed(error: Exception, args: tuple[Any, ...], call_sglang: Callable[[], Any]) -> Any:
            policy = get_policy()
            plan = self.manager.plan(impl.op_name, policy)
            place = function.place
            fit = [i for i in plan.candidates if i is impl or self.chooser.fits(i, place)]

            name = function.bridge.name
            return self.manager.call_after_failure(
                replace(plan, candidates=tuple(fit)),
                policy,
                impl,
                error,
                lambda other: recorded(name, str(other), other.fn, *args),
                lambda: recorded(name, f"sglang({impl} failed)", call_sglang),
            )

        return failed

    def refresh(self) -> None:
        """Follow a change of the global policy, or of whether any policy context is open.

        Raises:
            RuntimeError: a strict policy that a function cannot follow; then nothing has changed.
        """
        with self._lock:
            policy = PolicyManager.get_instance().get_global_policy()
            choices = [(function, self._choose(function, policy)) for function in self._functions.values()]
            for function, choice in choices:
                self._install(function, choice, strict=policy.strict)


def _is_called(own: Forward, bridge: FunctionBridge) -> bool:
    """Whether a module other than the function's own has imported it."""
    modules = [module for name, module in list(sys.modules.items()) if name != bridge.module and isinstance(module, ModuleType)]
    return any(value is own for module in modules for value in list(vars(module).values()))
