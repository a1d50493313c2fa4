# SPDX-License-Identifier: Apache-2.0
"""Binds a model's layers to implementations, and keeps them bound to what the policy says.

SGLang calls ``layer._forward_method`` and seeds that attribute itself to pin a layer; a layer is bound
by putting a forward there, as a method of the layer, so that copying the layer copies the binding.
"""

import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from ...config import Settings
from ..locks import ForkSafeLock
from ..logger_manager import dispatch_log
from ..manager import OpManager
from ..policy import PolicyManager, SelectionPolicy, get_policy, overrides
from ..types import OpImpl
from .activation import GeluAndMulBridge, NewGELUBridge, QuickGELUBridge, ReLU2Bridge, SiluAndMulBridge
from .base import LEFT_BEFORE_IT_IS_SO, OBJ, Bridge, Forward, NoContexts, Routes, Site, Watched, activation_dtype, device_of, recorded
from .choice import Choice, Chooser, Place
from .first_passes import FirstPasses
from .fused_moe import FusedMoEBridge
from .gemma_rms_norm import Gemma3RMSNormBridge, GemmaRMSNormBridge
from .layer_norm import LayerNormBridge
from .mrotary_embedding import MRotaryEmbeddingBridge
from .report import BindReport
from .rms_norm import Gemma4RMSNormBridge, RMSNormBridge, RMSNormWithoutScaleBridge
from .rotary_embedding import RotaryEmbeddingBridge
from .topk import TopKBridge

BRIDGES: tuple[Bridge, ...] = (
    FusedMoEBridge(),
    GeluAndMulBridge(),
    Gemma3RMSNormBridge(),
    Gemma4RMSNormBridge(),
    GemmaRMSNormBridge(),
    LayerNormBridge(),
    MRotaryEmbeddingBridge(),
    NewGELUBridge(),
    QuickGELUBridge(),
    RMSNormBridge(),
    RMSNormWithoutScaleBridge(),
    ReLU2Bridge(),
    RotaryEmbeddingBridge(),
    SiluAndMulBridge(),
    TopKBridge(),
)


@dataclass(frozen=True)
class _Layer:
    """A layer that a bridge can take over: everything about it that does not change."""

    bridge: Bridge
    site: Site
    own: Forward
    class_name: str
    name: str
    first_passes: FirstPasses


class Binder:
    """One for each process that runs a model."""

    def __init__(self, manager: OpManager, settings: Settings, *, deterministic: bool = False, log_level: int = logging.INFO):
        """
        Args:
            deterministic: only implementations declared batch-invariant may be used.
            log_level: for what is told once the model has run.
        """
        self.manager = manager
        self.settings = settings
        self.chooser = Chooser(manager, deterministic=deterministic)
        self.log_level = log_level
        self._layers: weakref.WeakKeyDictionary[nn.Module, _Layer] = weakref.WeakKeyDictionary()
        self._forwards: dict[tuple[Any, ...], Forward] = {}
        self._ours: set[Forward] = set()
        self._lock = ForkSafeLock()
        PolicyManager.get_instance().subscribe(self.refresh)

    def bind(self, model: nn.Module) -> BindReport:
        """Bind the layers of a model that the settings and the policy move.

        Raises:
            RuntimeError: under ``strict``, an implementation failed its trial, or there is none.
        """
        report = BindReport()
        log = dispatch_log()
        with self._lock:
            policy = PolicyManager.get_instance().get_global_policy()
            taken: dict[nn.Module, _Layer] = {}
            first_passes = FirstPasses(self.log_level)
            for layer, name, bridge, site in _layers_of(model):
                why = self._why_left(layer, bridge, site)
                if why is None:
                    taken[layer] = _Layer(bridge, site, _own_forward(layer), type(layer).__name__, name, first_passes)
                else:
                    report.add(bridge.op, type(layer).__name__, f"sglang({why})")
                    log.record(type(layer).__name__, f"sglang({why})")
            choices = {layer: self._choose(layer, info, policy) for layer, info in taken.items()}
            self._layers.update(taken)
            for layer, choice in choices.items():
                self._install(layer, taken[layer], choice)
                report.add(taken[layer].bridge.op, taken[layer].class_name, choice.destination)
                if choice.impl is None:
                    log.record(taken[layer].class_name, choice.destination)
        return report

    def _why_left(self, layer: nn.Module, bridge: Bridge, site: Site) -> str | None:
        """Why a layer stays with SGLang whatever the policy says, or None."""
        why = self.settings.why_left({cls.__name__ for cls in type(layer).__mro__})
        if why is not None:
            return why
        method = layer._forward_method
        if method is not None and getattr(method, "__func__", None) not in self._ours:
            return f"SGLang pinned it to {getattr(method, '__name__', method)}"
        if any(parameter.device != site.device for parameter in bridge.parameters(layer)):
            return "its weights are offloaded"
        return bridge.reason_at(site) or bridge.reason_to_leave(layer)

    def _choose(self, layer: nn.Module, info: _Layer, policy: SelectionPolicy) -> Choice:
        return self.chooser.choose(_place(layer, info), policy)

    def _install(self, layer: nn.Module, info: _Layer, choice: Choice) -> None:
        if choice.impl is not None:
            info.first_passes.expect(layer, info.name)
        if choice.impl is None and not overrides.active:
            self._put(layer, info, None)
            return
        self._put(layer, info, MethodType(self._forward(info, choice.impl, watch=True), layer))

    def _put(self, layer: nn.Module, info: _Layer, method: Any) -> None:
        """Put a method in the layer's place for its forward; None gives the place back to SGLang."""
        for place in ("_forward_method", "_original_forward_method") if layer.is_torch_compile else ("_forward_method",):
            found = getattr(layer, place)
            function = getattr(found, "__func__", None)
            # Under torch.compile the first place holds a forward made for it, and the second the usual one.
            free = place == "_original_forward_method" or not layer.is_torch_compile
            if function in self._ours or (free and method is not None and (found is None or function is info.own)):
                setattr(layer, place, method)

    def _forward(self, info: _Layer, impl: OpImpl | None, *, watch: bool) -> Forward:
        """The forward that layers like this one share.

        ``watch``: it gives way to open policy contexts, and its first call is put on record.
        """
        if impl is None and not watch:
            return info.own
        key = (info.bridge, info.own, impl, watch)
        if key not in self._forwards:
            self._forwards[key] = forward = self._build(info, impl, watch)
            self._ours.add(forward)
        return self._forwards[key]

    def _build(self, info: _Layer, impl: OpImpl | None, watch: bool) -> Forward:
        if impl is None:
            return self._divert
        routes = Routes(impl.fn, impl.dtypes(), info.own, overrides if watch else NoContexts(), self._divert, self._failed(impl))
        forward = _named(info.bridge.forward(routes), impl)
        if not watch:
            return forward
        self._ours.add(forward)
        watched = Watched(impl.fn)
        telling = info.bridge.forward(replace(routes, fn=watched))
        return _named(self._recording(forward, telling, watched, str(impl)), impl)

    def _recording(self, forward: Forward, telling: Forward, watched: Watched, destination: str) -> Forward:
        """A forward that puts on record where its first calls went, and then gives its place to ``forward``.

        A call that the operator cannot express goes to SGLang, and the next ones may be of the same kind: it keeps its place until one
        has reached the implementation, or a few have not. In the layer by which the model's first passes are counted it keeps the
        place until they are over.

        Args:
            telling: the same as ``forward``, with ``watched`` in the implementation's place.
        """
        left: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

        def first(layer: Any, /, *args: Any, **kwargs: Any) -> Any:  # SGLang may name an argument ``layer``
            if overrides.active or torch.compiler.is_compiling():
                return forward(layer, *args, **kwargs)
            info = self._layers.get(layer)
            counts = info is not None and info.first_passes.called(layer, shared=info.bridge.shared)
            result, is_left = watched.record(type(layer).__name__, destination, telling, layer, *args, **kwargs)
            if is_left:
                left[layer] = left.get(layer, 0) + 1
                counts |= left[layer] < LEFT_BEFORE_IT_IS_SO
            if not counts and getattr(layer._forward_method, "__func__", None) is first:
                layer._forward_method = MethodType(forward, layer)
            return result

        return first

    def _divert(self, layer: Any, /, *args: Any, **kwargs: Any) -> Any:  # SGLang may name an argument ``layer``
        """A call while a policy context is open somewhere: here, or in another thread or task."""
        info = self._layers.get(layer)
        if info is None:  # a copy of a bound layer
            with self._lock:
                info = self._layers[layer] = self._adopt(layer)
        policy = get_policy()
        choice = self._choose(layer, info, policy)
        dispatch_log().record(info.class_name, choice.destination)
        return self._forward(info, choice.impl, watch=False)(layer, *args, **kwargs)

    def _adopt(self, layer: nn.Module) -> _Layer:
        for info in self._layers.values():
            if info.class_name == type(layer).__name__:
                return info
        raise RuntimeError(f"{type(layer).__name__} was never bound")

    def _failed(self, impl: OpImpl) -> Forward:
        def failed(layer: nn.Module, error: Exception, args: tuple[Any, ...], sglang_args: tuple[Any, ...], **named: Any) -> Any:
            policy = get_policy()
            plan = self.manager.plan(impl.op_name, policy)
            info = self._layers.get(layer)
            if info is not None:
                place = _place(layer, info)
                fit = [i for i in plan.candidates if i is impl or self.chooser.fits(i, place)]
                plan = replace(plan, candidates=tuple(fit))

            name = type(layer).__name__
            return self.manager.call_after_failure(
                plan,
                policy,
                impl,
                error,
                lambda other: recorded(name, str(other), other.fn, vars(layer).get(OBJ, layer), *args, **named),
                lambda: recorded(name, f"sglang({impl} failed)", _own_forward(layer), layer, *sglang_args, **named),
            )

        return failed

    def refresh(self) -> None:
        """Follow a change of the global policy, or of whether any policy context is open.

        Raises:
            RuntimeError: a strict policy that a layer cannot follow; then nothing has changed.
        """
        with self._lock:
            policy = PolicyManager.get_instance().get_global_policy()
            layers = list(self._layers.items())
            choices = [(layer, info, self._choose(layer, info, policy)) for layer, info in layers]
            for layer, info, choice in choices:
                self._install(layer, info, choice)


def _layers_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, Bridge, Site]]:
    """The layers that a bridge is for, each with its name and its site."""
    dtype, device = activation_dtype(model), device_of(model)
    modules = dict(model.named_modules())
    # A class that another bridge's class derives from comes after it.
    loaded = [(bridge.layer_class, bridge) for bridge in BRIDGES if bridge.layer_class is not None]
    loaded.sort(key=lambda pair: -len(pair[0].__mro__))
    for name, layer in modules.items():
        bridge = next((bridge for base, bridge in loaded if isinstance(layer, base)), None)
        if bridge is not None:
            parent = modules.get(name.rpartition(".")[0], model)
            yield layer, name, bridge, Site(dtype, device, _intermediate_size(parent), _num_experts(parent), _fuses_activation(parent))


#: How SGLang's models name an MLP's first matrix, and how many activations it makes for each that goes on.
_FIRST_MATRICES = {"gate_up_proj": 2, "up_proj": 1, "fc1": 1, "c_fc": 1}


def _intermediate_size(parent: nn.Module) -> int | None:
    """The width of the activations behind an MLP's first matrix, on this rank."""
    for name, halves in _FIRST_MATRICES.items():
        width = getattr(getattr(parent, name, None), "output_size_per_partition", None)
        if isinstance(width, int):
            return width // halves
    return None


def _fuses_activation(parent: nn.Module) -> bool:
    """Whether an MLP has a kernel for SiLU and FP8 quantisation, and a last matrix that takes its result (Llama, Qwen2; Blackwell)."""
    return getattr(getattr(parent, "activation_quant", None), "enabled", False) is True


def _num_experts(parent: nn.Module) -> int | None:
    """How many experts the router beside a layer of experts chooses from."""
    found = (getattr(child, "num_global_routed_experts", None) for child in parent.children())
    return next((count for count in found if isinstance(count, int)), None)


def _own_forward(layer: Any) -> Forward:
    """The function that SGLang itself would run for this layer."""
    method = layer._resolve_forward_method()
    function: Forward | None = getattr(method, "__func__", None)
    if function is not None:
        return function

    def resolve_and_call(layer: Any, /, *args: Any, **kwargs: Any) -> Any:
        return layer._resolve_forward_method()(*args, **kwargs)

    return resolve_and_call


def _place(layer: nn.Module, info: _Layer) -> Place:
    bridge, site = info.bridge, info.site
    return Place(bridge.op, info.class_name, site.dtype, site.device, bridge.trial_key(layer, site), partial(bridge.trial, layer, site))


def _named(forward: Forward, impl: OpImpl) -> Forward:
    """SGLang's tracing labels a call by the name of the forward behind ``forward_``."""
    forward.__name__ = forward.__qualname__ = f"forward_{impl.impl_id}"
    return forward
