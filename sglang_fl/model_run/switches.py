# SPDX-License-Identifier: Apache-2.0
"""The replacements of sglang-fl in this process: switched on and off, and observed."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from ..aten import in_force
from ..bind import process_binder
from ..dispatch.bridge.layer import LayerSocket
from ..dispatch.bridge.socket import Socket, mark_as_ours
from ..dispatch.types import OpImpl

Function = Callable[..., Any]
LAYER, FUNCTION, ATEN = "layer class", "function", "FlagGems function"


@dataclass(frozen=True, order=True)
class Replacement:
    """A replacement that the settings can turn off by itself.

    Attributes:
        kind: a layer class of SGLang, a function of SGLang, or a FlagGems function.
        name: the name of that class or function.
        by: the implementation that replaces it. For a FlagGems function: the ATen operators that it replaces.
    """

    kind: str
    name: str
    by: str

    def __str__(self) -> str:
        return f"{self.name} → {self.by}" if self.kind != ATEN else f"{self.name} (FlagGems, {self.by})"


class LayerCall(NamedTuple):
    """A call of a bound layer or function.

    Attributes:
        replacement: the replacement that is bound.
        path: the layer's name in the model, or the function's name.
        socket: the call site.
        impl: the implementation.
        forward: ``forward(around)`` builds a forward like the bound one that calls ``around(implementation's function)``.
    """

    replacement: Replacement
    path: str
    socket: Socket
    impl: OpImpl
    forward: Callable[[Callable[[Function], Function] | None], Function]


class AtenCall(NamedTuple):
    """A call of a replaced ATen operator.

    Attributes:
        replacement: the FlagGems function.
        key: the ATen operator, ``mul.Tensor``.
        fn: the function itself.
        registered: the registered function: ``fn``, or a wrapper that tries its first call.
        kernel: PyTorch's own kernel, which may call other operators. None: it cannot be called.
    """

    replacement: Replacement
    key: str
    fn: Function
    registered: Function
    kernel: Function | None


class Switches:
    """All replacements in the models of this process.

    Attributes:
        replacements: one for each pair of layer class and implementation, and for each FlagGems function.
    """

    def __init__(self) -> None:
        binder, self._operators = process_binder(), in_force()
        self._sockets: dict[Socket, LayerCall] = {}
        for socket, impl in binder.bound().items():
            path = socket.path if isinstance(socket, LayerSocket) else socket.name
            replacement = Replacement(LAYER if isinstance(socket, LayerSocket) else FUNCTION, socket.name, impl.impl_id)
            self._sockets[socket] = LayerCall(replacement, path, socket, impl, partial(binder.forward, socket, impl))
        functions = self._operators.functions if self._operators is not None else {}
        self._functions = {name: Replacement(ATEN, name, ", ".join(keys)) for name, keys in functions.items()}
        found = {*(call.replacement for call in self._sockets.values()), *self._functions.values()}
        self.replacements = tuple(sorted(found))
        self._on = frozenset(self.replacements)
        self._layer_around: Callable[[LayerCall], Function] | None = None

    def refused(self) -> dict[str, str]:
        """Implementations and FlagGems functions that the settings prefer and that are not used -> why."""
        refused = process_binder().refused()
        if self._operators is None:
            return refused
        left = {name: why for _, name, why in self._operators.report.left if name in self._operators.excluded}
        return refused | {f"{name} (FlagGems)": why for name, why in left.items()}

    def set(self, on: Collection[Replacement]) -> None:
        """Turn these on and all others off.

        Raises:
            ValueError: one of them is not a replacement here.
        """
        if unknown := set(on) - set(self.replacements):
            raise ValueError(f"not replacements in this process: {', '.join(map(str, sorted(unknown)))}")
        self._on = frozenset(on)
        self._install()
        if self._operators is not None:
            for name in self._operators.functions:  # some functions may be excluded by now
                self._operators.switch(name, self._functions[name] in self._on)

    @contextmanager
    def only(self, on: Collection[Replacement]) -> Iterator[None]:
        """Within the block, turn only these on."""
        before = self._on
        self.set(on)
        try:
            yield
        finally:
            self.set(before)

    @contextmanager
    def observed(self, layer: Callable[[LayerCall], Function], aten: Callable[[AtenCall], Function]) -> Iterator[None]:
        """Within the block, wrap what is on.

        Args:
            layer: returns a forward, which is called with the layer (or a function's hook) and SGLang's arguments.
            aten: returns a function like FlagGems's.
        """

        def around(function: str, key: str, fn: Function, registered: Function, kernel: Function | None) -> Function:
            return aten(AtenCall(self._functions[function], key, fn, registered, kernel))

        self._observe(layer, around)
        try:
            yield
        finally:
            self._observe(None, None)

    def _observe(self, layer: Callable[[LayerCall], Function] | None, around: Any) -> None:
        self._layer_around = layer
        self._install()
        if self._operators is not None and in_force() is self._operators:
            self._operators.observe(around)

    def _install(self) -> None:
        for socket, call in self._sockets.items():
            if call.replacement not in self._on:
                socket.install(None)
            elif self._layer_around is None:
                socket.install(call.forward(None))
            else:
                socket.install(mark_as_ours(self._layer_around(call)))
