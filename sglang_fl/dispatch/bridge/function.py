# SPDX-License-Identifier: Apache-2.0
"""Functions of SGLang, where it calls one and no layer that could be bound.

A function is taken over by an AROUND hook in SGLang's own HookRegistry, which puts it in every module that has imported
the function. That happens once a model that calls it was loaded, and only if the policy moves it: hooks that
``load_plugin`` registered would have SGLang import their targets, seconds' worth, in each of its processes.
"""

import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ...compat import hook
from .base import Bridge, Forward
from .catalog import FUNCTIONS
from .socket import Load, Socket


class FunctionBridge(Bridge):
    """Between one function of SGLang and one operator."""

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
        """The function was taken over, and nothing has run yet: the moment to watch for SGLang going past it."""


class FunctionSocket(Socket):
    """A function that models call; it is itself the subject of its forwards."""

    bridge: FunctionBridge

    def __init__(self, bridge: FunctionBridge, contexts: set[Any], load: Load):
        super().__init__(bridge, bridge.name, load)
        self.names = {bridge.name}
        self.forward: Forward | None = None
        self._contexts = tuple(contexts)
        self._is_hooked = False
        self._hook_problem: str | None = None

    @cached_property
    def function(self) -> Forward:
        """SGLang's, as it was before any hook of ours."""
        found: Forward = getattr(import_module(self.bridge.module), self.bridge.name)
        return found

    def also_for(self, contexts: set[Any], load: Load) -> None:
        """Another model calls it, too."""
        self._contexts = tuple({*self._contexts, *contexts})
        self.load = load

    @property
    def subject(self) -> "FunctionSocket":
        return self

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._contexts[0].dtype
        return found

    @property
    def device(self) -> torch.device:
        found: torch.device = self._contexts[0].device
        return found

    @property
    def trial_key(self) -> tuple[Any, ...]:
        return (frozenset(self._contexts),)

    @cached_property
    def own(self) -> Forward:
        function = self.function

        def own(subject: "FunctionSocket", /, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return own

    def exclusion_reason(self) -> str | None:
        reason = self.bridge.exclusion_reason()
        if reason is None and not self._is_hooked and not self._is_called():
            return "nothing that SGLang has loaded calls it"
        return reason

    def _is_called(self) -> bool:
        """Whether a module other than the function's own has imported it."""
        modules = [module for name, module in list(sys.modules.items()) if name != self.bridge.module and isinstance(module, ModuleType)]
        return any(value is self.function for module in modules for value in list(vars(module).values()))

    def trial(self, fn: Forward) -> None:
        for context in self._contexts:
            self.bridge.trial(self, context, fn)

    def prepare(self) -> str | None:
        if not self._is_hooked and self._hook_problem is None:
            if hook(f"{self.bridge.module}.{self.bridge.name}", self._around):
                self._is_hooked = True
                self.bridge.hooked(self.load.log_level)
            else:
                self._hook_problem = "another plugin has a hook there, or SGLang's log says why it took none"
        return self._hook_problem

    def _around(self, own: Forward, *args: Any, **kwargs: Any) -> Any:
        forward = self.forward
        return own(*args, **kwargs) if forward is None else forward(self, *args, **kwargs)

    def install(self, forward: Forward | None) -> None:
        self.forward = forward if self._is_hooked else None

    @staticmethod
    def replace(subject: "FunctionSocket", installed: Forward, forward: Forward) -> None:
        if subject.forward is installed:
            subject.forward = forward


def function_sockets(
    model: nn.Module, bridges: Iterable[FunctionBridge], known: dict[str, FunctionSocket], load: Load
) -> Iterator[FunctionSocket]:
    """A socket for each function that a model calls; ``known`` are those of earlier models, by operator."""
    for bridge in bridges:
        contexts = bridge.contexts(model)
        if contexts and bridge.op in known:
            known[bridge.op].also_for(contexts, load)
            yield known[bridge.op]
        elif contexts:
            yield FunctionSocket(bridge, contexts, load)
