# SPDX-License-Identifier: Apache-2.0
"""Kernels that SGLang calls outside of its layers, each an operator of its own.

They are bound before a model is loaded, in each process: some run while weights are loaded, some in no model's process. So nothing
is known of their arguments, none is tried, and a function is imported at its first call.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...device import Device
from ...kernels.places import KernelHook, put_in_place
from ..kernel_implementations import exclusion_reason, names_of, replaceable
from ..registry import OpRegistry
from .base import Bridge, Forward, Routes
from .socket import HookSocket, Load, mark_as_ours


class KernelBridge(Bridge):
    """Hands SGLang's arguments on as they are, behind the grid."""

    def __init__(self, target: str):
        self.op = target  # type: ignore[misc]  # a class for each would have nothing of its own

    def trial(self, subject: Any, context: Any, fn: Forward) -> None:
        """Nothing is known of the arguments."""

    def forward(self, routes: Routes) -> Forward:
        fn, contexts, divert, failed = routes.fn, routes.contexts, routes.divert, routes.failed

        def forward(hook: KernelHook, grid: Any, /, *args: Any, **kwargs: Any) -> Any:
            if contexts.active:
                return divert(hook, grid, *args, **kwargs)
            try:
                return fn(grid, *args, **kwargs)
            except Exception as error:
                given = (grid, *args)
                return failed(hook, error, given, given, **kwargs)

        return forward


def _own(hook: KernelHook, grid: Any, /, *args: Any, **kwargs: Any) -> Any:
    return hook.own(*args, **kwargs) if grid is None else hook.own[grid](*args, **kwargs)


class KernelSocket(HookSocket):
    """A kernel of SGLang's. Its forwards are called with its hook, a launch's grid or None, and SGLang's arguments."""

    hook: KernelHook
    is_tried = False
    dtype, device = torch.get_default_dtype(), torch.device("cpu")  # of no meaning here

    def __init__(self, target: str, load: Load):
        super().__init__(KernelBridge(target), target, load)
        self.names = names_of(target)
        self.hook = KernelHook()
        self._is_placed = False

    @property
    def trial_key(self) -> tuple[Any, ...]:
        return ()

    @property
    def own(self) -> Forward:
        return _own

    def exclusion_reason(self) -> str | None:
        return exclusion_reason(self.load.settings, self.op)

    def trial(self, fn: Forward) -> None:
        pass

    def prepare(self) -> str | None:
        if not self._is_placed:
            put_in_place({self.op: self.hook})
            self._is_placed = True
        return None

    def install(self, forward: Forward | None) -> None:
        self.hook.forward = forward

    def install_late(self, build: Callable[[], Forward]) -> None:
        """Install a forward that is built, and so imported, at the first call."""

        @mark_as_ours
        def first(hook: KernelHook, grid: Any, /, *args: Any, **kwargs: Any) -> Any:
            try:
                forward = build()
            except Exception as error:
                error.add_note(f"sglang-fl: raised while the function for {self.op} was imported")
                raise
            self.replace(hook, first, forward)
            return forward(hook, grid, *args, **kwargs)

        self.install(first)


def kernel_sockets(registry: OpRegistry, device: Device, known: dict[str, KernelSocket], load: Load) -> Iterator[KernelSocket]:
    """A socket for each kernel for which something can run on this device; ``known`` are those of an earlier time."""
    here = replaceable(registry, load.settings, device)
    for op in dict.fromkeys((*known, *here)):
        if op in known:
            known[op].load = load
        yield known.get(op) or KernelSocket(op, load)
