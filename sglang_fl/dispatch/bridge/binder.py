# SPDX-License-Identifier: Apache-2.0
"""Binds a model's call sites to implementations, and follows changes of the policy."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from ...device import Device
from ..locks import ForkSafeLock
from ..logger_manager import dispatch_log
from ..manager import OpManager
from ..policy import Overrides, PolicyManager, get_policy, overrides
from ..types import OpImpl
from .base import Forward, Routes
from .bridges import FUNCTION_BRIDGES, LAYER_BRIDGES
from .function import FunctionSocket, function_sockets
from .kernel import KernelSocket, kernel_sockets
from .layer import LayerSocket, layer_sockets
from .recording import MAX_RECORDED_FALLBACKS, RecordingFunction, call_and_record
from .report import BindReport
from .selector import Selection, Selector
from .socket import Load, Socket, mark_as_ours

#: Returns what each rank gave, by rank.
Exchange = Callable[[Any], list[Any]]
SomeSocket = TypeVar("SomeSocket", bound=Socket)


class Binder:
    """One for each process that runs models.

    ``bind`` selects an implementation for each socket (:class:`Selector`), has the socket's bridge build a forward around it, and
    installs that. ``refresh`` does the same again where the policy has changed.
    """

    def __init__(self, manager: OpManager):
        self.manager = manager
        self._selector = Selector(manager)
        #: By what their forwards are called with: a layer, or the hook of a function.
        self._sockets: weakref.WeakKeyDictionary[Any, Socket] = weakref.WeakKeyDictionary()
        self._forwards: dict[tuple[Any, ...], Forward] = {}
        self._lock = ForkSafeLock()
        self._divert = mark_as_ours(self._diverting())
        PolicyManager.get_instance().subscribe(self.refresh)

    def bind(self, model: nn.Module, load: Load, exchange: Exchange = lambda value: [value]) -> BindReport:
        """Bind a model's layers, and the functions that it calls, where the settings and the policy say so.

        Args:
            exchange: what each rank gives, by rank; all of them bind the same model.

        Raises:
            RuntimeError: under ``strict``, an implementation failed its trial, there is none, or SGLang did not take a hook.
                Nothing is bound then that was not bound before.
        """
        report = BindReport()
        with self._lock:
            known = self._known(FunctionSocket)
            sockets: list[Socket] = [*layer_sockets(model, LAYER_BRIDGES, load), *function_sockets(model, FUNCTION_BRIDGES, known, load)]
            reasons = {socket: load.settings.exclusion_reason(socket.names) or socket.exclusion_reason() for socket in sockets}
            selections = self._select_together([socket for socket in sockets if reasons[socket] is None], exchange)
            self._settle(sockets, selections)
            for socket in sockets:
                selection = selections.get(socket) or Selection(None, reasons[socket] or "")
                report.add(socket, selection.destination)
                if selection.impl is None:
                    dispatch_log().record(socket.name, selection.destination)
        return report

    def bind_kernels(self, load: Load, device: Device) -> dict[str, list[str]]:
        """Bind the kernels that SGLang calls outside of its layers; again, once it is known how a model is loaded.

        Returns:
            Implementation -> the kernels that run on it.

        Raises:
            RuntimeError: under ``strict``, no implementation can run.
        """
        with self._lock:
            sockets: list[Socket] = [*kernel_sockets(self.manager.registry, device, self._known(KernelSocket), load)]
            selections = self._select([socket for socket in sockets if socket.exclusion_reason() is None])
            self._settle(sockets, selections)
        bound: dict[str, list[str]] = {}
        for socket, selection in selections.items():
            if selection.impl is not None:
                bound.setdefault(selection.destination, []).append(socket.op)
        return bound

    def _known(self, kind: type[SomeSocket]) -> dict[str, SomeSocket]:
        """The sockets of a kind that earlier loads have made, by operator."""
        return {socket.op: socket for socket in self._sockets.values() if isinstance(socket, kind)}

    def _settle(self, sockets: list[Socket], selections: dict[Socket, Selection]) -> None:
        """Install what was selected; a socket without a selection goes back to SGLang, if an earlier load bound it."""
        for socket in sockets:
            if socket in selections:
                self._sockets[socket.subject] = socket
                self._install(socket, selections[socket])
            elif self._sockets.pop(socket.subject, None) is not None:
                socket.install(None)

    def refresh(self) -> None:
        """Follow a change of the global policy, or of whether any policy context is open.

        Raises:
            RuntimeError: a strict policy that a socket cannot follow; then nothing has changed.
        """
        with self._lock:
            alive = list(self._sockets.items())  # holds references, so that no layer is collected during the loop
            for socket, selection in self._select([socket for _, socket in alive]).items():
                self._install(socket, selection)

    def bound(self) -> dict[Socket, OpImpl]:
        """What the policy in force binds of the models that were loaded: layers and functions."""
        return {socket: selection.impl for socket, selection in self._in_force().items() if selection.impl is not None}

    def refused(self) -> dict[str, str]:
        """The implementations that the policy in force would use first in these models, and does not: ``RMSNorm → vendor.x`` -> why."""
        refused = ((socket.name, selection.refused) for socket, selection in self._in_force().items())
        return {f"{name} → {impl_id}": why for name, reasons in refused for impl_id, why in reasons.items()}

    def _in_force(self) -> dict[Socket, Selection]:
        with self._lock:
            alive = list(self._sockets.items())
            return self._select([socket for _, socket in alive if not isinstance(socket, KernelSocket)])

    def forward(self, socket: Socket, impl: OpImpl, around: Callable[[Forward], Forward] | None = None) -> Forward:
        """What is installed in a socket for an implementation; with ``around``, what that makes of its function takes its place."""
        if around is None:
            return self._forward(socket, impl)
        routes = self._routes(socket, impl)
        return _named(socket.bridge.forward(routes._replace(fn=around(impl.function))), impl)

    def sockets(self) -> list[Socket]:
        """The call sites that it moves, or leaves to SGLang because of the policy alone."""
        return list(self._sockets.values())

    def _select_together(self, sockets: list[Socket], exchange: Exchange) -> dict[Socket, Selection]:
        """The selection of all ranks: what failed its trial on one is used on none. All have the same sockets in the same order."""
        known: dict[tuple[int, str], str] = {}
        while True:
            selections = self._select(sockets)
            given = exchange({(i, impl_id): why for i, socket in enumerate(sockets) for impl_id, why in selections[socket].failed.items()})
            failed = {key: f"rank {rank}: {reason}" for rank, found in enumerate(given) for key, reason in found.items()}
            if failed.keys() <= known.keys() or len(given) == 1:
                return selections
            known |= failed
            for (index, impl_id), reason in failed.items():
                for impl in self.manager.plan(sockets[index].op, PolicyManager.get_instance().get_global_policy()).candidates:
                    if impl.impl_id == impl_id:
                        self._selector.failed_elsewhere(impl, sockets[index], reason)

    def _select(self, sockets: list[Socket]) -> dict[Socket, Selection]:
        """What the policy selects for each, ready to be installed; nothing has changed yet."""
        policy = PolicyManager.get_instance().get_global_policy()
        selected = {socket: self._selector.select(socket, policy) for socket in sockets}
        for socket, selection in selected.items():
            problem = socket.prepare() if selection.impl is not None or overrides.active else None
            if problem is None:
                continue
            message = f"{socket.name} stays with SGLang: {problem}"
            if policy.strict:
                raise RuntimeError(f"sglang-fl: {message}")
            self._selector.warn_once(message)
            selected[socket] = Selection(None, problem)
        return selected

    def _install(self, socket: Socket, selection: Selection) -> None:
        if selection.impl is not None and isinstance(socket, KernelSocket):
            socket.install_late(partial(self._forward, socket, selection.impl))
        elif selection.impl is not None:
            socket.install(self._forward(socket, selection.impl))
        else:
            socket.install(self._divert if overrides.active else None)

    def _forward(self, socket: Socket, impl: OpImpl) -> Forward:
        """The forward that sockets like this one share: it defers to open policy contexts, and records its first call."""
        key = (socket.bridge, socket.own, impl)
        if key not in self._forwards:
            routes = self._routes(socket, impl)
            forward = _named(socket.bridge.forward(routes), impl)
            function = RecordingFunction(impl.function)
            recording = socket.bridge.forward(routes._replace(fn=function))
            self._forwards[key] = _named(self._recording(socket, forward, recording, function, str(impl)), impl)
        return self._forwards[key]

    def direct_forward(self, socket: Socket, impl: OpImpl | None) -> Forward:
        """The forward that an open policy context selects."""
        if impl is None:
            return socket.own
        key = (socket.bridge, socket.own, impl, "direct")
        if key not in self._forwards:
            self._forwards[key] = _named(socket.bridge.forward(self._routes(socket, impl)._replace(contexts=Overrides())), impl)
        return self._forwards[key]

    def _routes(self, socket: Socket, impl: OpImpl) -> Routes:
        return Routes(impl.function, impl.dtypes(), socket.own, overrides, self._divert, self._failed(socket.own, impl))

    def _recording(self, socket: Socket, forward: Forward, recording: Forward, function: RecordingFunction, destination: str) -> Forward:
        """A forward that records where its first calls went, and is then replaced by ``forward``.

        A call that the operator cannot express goes to SGLang, and the next ones may be of the same kind: it keeps its place until
        one has reached the implementation, or MAX_RECORDED_FALLBACKS have not. In the layer by which the model's first passes are
        counted it keeps the place until they are over.

        Args:
            recording: the same as ``forward``, with ``function`` in the implementation's place.
        """
        fallbacks: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        replace_forward = socket.replace

        def first(subject: Any, /, *args: Any, **kwargs: Any) -> Any:  # SGLang may name an argument ``layer``
            if overrides.active or torch.compiler.is_compiling():
                return forward(subject, *args, **kwargs)
            known = self._sockets.get(subject)
            keeps = known is not None and known.count_pass()
            name = known.name if known is not None else type(subject).__name__
            result, fell_back = function.record(name, destination, recording, subject, *args, **kwargs)
            if fell_back:
                fallbacks[subject] = fallbacks.get(subject, 0) + 1
                keeps |= fallbacks[subject] < MAX_RECORDED_FALLBACKS
            if not keeps:
                replace_forward(subject, first, forward)
            return result

        return first

    def _diverting(self) -> Forward:
        """The forward of calls while a policy context is open somewhere: here, or in another thread or task."""

        def divert(subject: Any, /, *args: Any, **kwargs: Any) -> Any:  # SGLang may name an argument ``layer``
            socket = self._sockets.get(subject) or self._adopt(subject)
            selection = self._selector.select(socket, get_policy())
            dispatch_log().record(socket.name, selection.destination)
            return self.direct_forward(socket, selection.impl)(subject, *args, **kwargs)

        return divert

    def _adopt(self, layer: nn.Module) -> Socket:
        """A socket for a copy of a bound layer."""
        with self._lock:
            for socket in self._sockets.values():
                if isinstance(socket, LayerSocket) and socket.name == type(layer).__name__:
                    self._sockets[layer] = adopted = socket.for_copy(layer)
                    return adopted
        raise RuntimeError(f"{type(layer).__name__} was never bound")

    def _failed(self, own: Forward, impl: OpImpl) -> Forward:
        """Takes a call in which the implementation raised; see :class:`Routes`."""

        def failed(subject: Any, error: Exception, args: tuple[Any, ...], sglang_args: tuple[Any, ...], /, **named: Any) -> Any:
            policy = get_policy()
            plan = self.manager.plan(impl.op_name, policy)
            socket = self._sockets.get(subject)
            name = socket.name if socket is not None else type(subject).__name__
            if socket is not None:
                fit = [i for i in plan.candidates if i is impl or self._selector.fits(i, socket)]
                plan = replace(plan, candidates=tuple(fit))
            return self.manager.call_after_failure(
                plan,
                policy,
                impl,
                error,
                lambda other: call_and_record(name, str(other), other.function, *args, **named),
                lambda: call_and_record(name, f"sglang({impl} failed)", own, subject, *sglang_args, **named),
            )

        return failed


def _named(forward: Forward, impl: OpImpl) -> Forward:
    """SGLang's tracing labels a call by the name of the forward behind ``forward_``."""
    forward.__name__ = forward.__qualname__ = f"forward_{impl.impl_id}"
    return mark_as_ours(forward)
