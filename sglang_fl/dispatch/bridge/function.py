# SPDX-License-Identifier: Apache-2.0
"""Functions of SGLang, where it calls one and no layer that could be bound.

A function is replaced by an AROUND hook in SGLang's own HookRegistry, which puts it in every module that has imported
the function. That happens once a model that calls it was loaded, and only if the policy moves it: hooks that
``load_plugin`` registered would have SGLang import their targets, seconds' worth, in each of its processes.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib import import_module
from inspect import signature
from typing import Any, ClassVar

from torch import nn

from ...compat import hook as place_hook
from ..catalog import FUNCTIONS
from .base import Bridge, Forward, Routes
from .socket import HookSocket, Load


class FunctionBridge(Bridge):
    """Between one function of SGLang and one operator.

    Attributes:
        arguments: has the parameters of SGLang's function, and returns the operator's arguments. None: SGLang keeps the call, which says
            more than the operator's signature.
        activations: which of the operator's arguments has the dtype of the activations.
    """

    arguments: ClassVar[Callable[..., tuple[Any, ...] | None]]
    activations: ClassVar[int] = 0

    @property
    def module(self) -> str:
        """The module that defines the function."""
        return FUNCTIONS[self.op][0]

    @property
    def name(self) -> str:
        return FUNCTIONS[self.op][1]

    @abstractmethod
    def contexts(self, model: nn.Module) -> set[Any]:
        """What a model calls the function for, equal where one trial speaks for both: it has a ``dtype`` and a ``device``,
        those of the activations. Empty if the model does not call it.
        """

    def exclusion_reason(self) -> str | None:
        """Why the function stays with SGLang, or None."""
        return None

    def hooked(self, log_level: int) -> None:
        """Called when the function was hooked, before the first run: watch whether SGLang bypasses it."""

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own, contexts, divert, failed = routes
        arguments, activations = self.arguments, self.activations

        def forward(hook: "FunctionHook", /, *args: Any, **kwargs: Any) -> Any:
            if contexts.active:
                return divert(hook, *args, **kwargs)
            given = arguments(*args, **kwargs)
            if given is None or (dtypes is not None and given[activations].dtype not in dtypes):
                return own(hook, *args, **kwargs)
            try:
                return fn(*given)
            except Exception as error:
                bound = signature(arguments).bind(*args, **kwargs)
                bound.apply_defaults()
                return failed(hook, error, given, bound.args, **bound.kwargs)

        return forward


class FunctionHook:
    """What stands in a function's place; calls go to ``forward``, or to SGLang's function if it is None."""

    def __init__(self) -> None:
        self.forward: Forward | None = None
        self.is_placed = False
        self.problem: str | None = None

    def around(self, own: Forward, *args: Any, **kwargs: Any) -> Any:
        forward = self.forward
        return own(*args, **kwargs) if forward is None else forward(self, *args, **kwargs)


class FunctionSocket(HookSocket):
    """A function that models call."""

    bridge: FunctionBridge
    hook: FunctionHook

    def __init__(self, bridge: FunctionBridge, contexts: set[Any], load: Load):
        super().__init__(bridge, bridge.name, load)
        self.names = {bridge.name}
        self.hook = FunctionHook()
        self._contexts = tuple(contexts)
        self.dtype, self.device = self._contexts[0].dtype, self._contexts[0].device

    def also_for(self, contexts: set[Any], load: Load) -> "FunctionSocket":
        """The same function, called by one more model."""
        socket = copy.copy(self)
        socket._contexts = tuple({*self._contexts, *contexts})
        socket.load = load
        return socket

    @property
    def trial_key(self) -> tuple[Any, ...]:
        return (frozenset(self._contexts),)

    @cached_property
    def own(self) -> Forward:
        function: Forward = getattr(import_module(self.bridge.module), self.bridge.name)

        def own(subject: FunctionHook, /, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return own

    def exclusion_reason(self) -> str | None:
        return self.bridge.exclusion_reason()

    def trial(self, fn: Forward) -> None:
        for context in self._contexts:
            self.bridge.trial(self.hook, context, fn)

    def prepare(self) -> str | None:
        if not self.hook.is_placed and self.hook.problem is None:
            _ = self.own  # as it is without a hook of ours
            if place_hook(f"{self.bridge.module}.{self.bridge.name}", self.hook.around):
                self.hook.is_placed = True
                self.bridge.hooked(self.load.log_level)
            else:
                self.hook.problem = "another plugin hooks it already, or the hook failed (see SGLang's log)"
        return self.hook.problem

    def install(self, forward: Forward | None) -> None:
        self.hook.forward = forward if self.hook.is_placed else None


def function_sockets(
    model: nn.Module, bridges: Iterable[FunctionBridge], known: dict[str, FunctionSocket], load: Load
) -> Iterator[FunctionSocket]:
    """A socket for each function that a model calls; ``known`` are those of earlier models, by operator."""
    for bridge in bridges:
        contexts = bridge.contexts(model)
        if contexts and bridge.op in known:
            yield known[bridge.op].also_for(contexts, load)
        elif contexts:
            yield FunctionSocket(bridge, contexts, load)
