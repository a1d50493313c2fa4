# SPDX-License-Identifier: Apache-2.0
"""Layers of SGLang: which a bridge covers, what surrounds them in the model, and the attribute that a forward is bound to."""

import copy
import sys
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from types import MethodType
from typing import Any, ClassVar

from torch import nn

from ..catalog import LAYERS
from .base import Bridge, Forward, ModelContext, activation_dtype, device_of
from .first_passes import FirstPasses
from .socket import Load, Socket, is_ours

#: An instance of one of SGLang's layer classes, which are not imported here.
Layer = Any


class LayerBridge(Bridge):
    """Between one SGLang layer class and one operator."""

    #: The class whose forward the bridge replaces; None: the operator's first.
    class_name: ClassVar[str | None] = None
    #: Whether a model's layers share one object of the class.
    shared: ClassVar[bool] = False
    #: SGLang's variable by which a user keeps the class's plain-PyTorch forward on an NPU.
    npu_switch: ClassVar[str | None] = None

    @property
    def layer_class(self) -> type[nn.Module] | None:
        """SGLang's class, or None where its module is not imported: then no layer of it exists."""
        module, name = next(layer for layer in LAYERS[self.op] if self.class_name in (None, layer[1]))
        return getattr(sys.modules.get(module), name, None)

    def parameters(self, layer: Layer) -> Iterator[nn.Parameter]:
        """The weights that it reads, which may be another module's."""
        return layer.parameters()

    def exclusion_reason(self, layer: Layer, context: ModelContext) -> str | None:
        """Why the layer stays with SGLang: the operator's signature cannot say what it computes. None: it can."""
        base = self.layer_class
        assert base is not None
        changed = sorted(overridden(type(layer), base))
        if changed:
            return f"{type(layer).__name__} overrides {', '.join(changed)}"
        if "forward" in vars(layer):
            return "its forward was replaced"
        if self.npu_switch is not None and _is_on_npu(self.npu_switch):
            return f"{self.npu_switch} is set"
        return self.attribute_reason(layer)

    def attribute_reason(self, layer: Layer) -> str | None:
        """The part of :meth:`exclusion_reason` that depends on the layer's attributes."""
        return None

    @abstractmethod
    def trial_key(self, layer: Layer, context: ModelContext) -> tuple[Any, ...]:
        """Equal for layers (of one dtype, on one device) for which one trial is valid."""


class LayerSocket(Socket):
    """One layer of a model. SGLang calls its ``_forward_method``, and seeds that attribute itself to pin a layer.

    A forward is put there as a method of the layer, so that copying the layer copies the binding.
    """

    bridge: LayerBridge

    def __init__(self, layer: Layer, path: str, bridge: LayerBridge, context: ModelContext, load: Load, first_passes: FirstPasses):
        super().__init__(bridge, type(layer).__name__, load)
        self._layer = weakref.ref(layer)
        self.path = path
        self.context, self.dtype, self.device = context, context.dtype, context.device
        self.first_passes = first_passes
        self.names = {cls.__name__ for cls in type(layer).__mro__}

    def for_copy(self, layer: Layer) -> "LayerSocket":
        """The same for a copy of the layer."""
        socket = copy.copy(self)
        socket._layer = weakref.ref(layer)
        return socket

    @property
    def subject(self) -> Layer:
        layer = self._layer()
        assert layer is not None, "a socket is only asked while its layer lives"
        return layer

    @property
    def trial_key(self) -> tuple[Any, ...]:
        return self.dtype, self.device, *self.bridge.trial_key(self.subject, self.context)

    @cached_property
    def own(self) -> Forward:
        return own_forward(self.subject)

    def exclusion_reason(self) -> str | None:
        layer = self.subject
        method = layer._forward_method
        if method is not None and not is_ours(getattr(method, "__func__", None)):
            return f"SGLang pinned it to {getattr(method, '__name__', method)}"
        if any(parameter.device != self.device for parameter in self.bridge.parameters(layer)):
            return "its weights are offloaded"
        return self.bridge.exclusion_reason(layer, self.context)

    def trial(self, fn: Forward) -> None:
        self.bridge.trial(self.subject, self.context, fn)

    def install(self, forward: Forward | None) -> None:
        layer = self._layer()
        if layer is None:
            return
        if forward is not None:
            self.first_passes.expect(layer, self.path)
        # Under torch.compile the first attribute holds a forward made for it, and the second the usual one.
        names = ("_forward_method", "_original_forward_method") if layer.is_torch_compile else ("_forward_method",)
        for name in names:
            found = getattr(layer, name)
            function = getattr(found, "__func__", None)
            is_free = forward is not None and (found is None or function is self.own) and (len(names) == 1 or name == names[1])
            if is_ours(function) or is_free:
                setattr(layer, name, None if forward is None else MethodType(forward, layer))

    def count_pass(self) -> bool:
        return self.first_passes.called(self.subject, shared=self.bridge.shared)

    @staticmethod
    def replace(subject: Layer, installed: Forward, forward: Forward) -> None:
        if getattr(subject._forward_method, "__func__", None) is installed:
            subject._forward_method = MethodType(forward, subject)


def layer_sockets(model: nn.Module, bridges: Iterable[LayerBridge], load: Load) -> Iterator[LayerSocket]:
    """A socket for each layer of a model that a bridge is for."""
    dtype, device = activation_dtype(model), device_of(model)
    first_passes = FirstPasses(load.log_level)
    modules = dict(model.named_modules())
    # A class that another bridge's class derives from comes after it.
    loaded = [(bridge.layer_class, bridge) for bridge in bridges if bridge.layer_class is not None]
    loaded.sort(key=lambda pair: -len(pair[0].__mro__))
    for path, layer in modules.items():
        bridge = next((bridge for base, bridge in loaded if isinstance(layer, base)), None)
        if bridge is not None:
            parent = modules.get(path.rpartition(".")[0], model)
            sizes = _intermediate_size(parent), _num_experts(parent)
            context = ModelContext(dtype, device, *sizes, _fuses_activation(parent), _heads(parent))
            yield LayerSocket(layer, path, bridge, context, load, first_passes)


def own_forward(layer: Layer) -> Forward:
    """The function that SGLang itself would run for a layer."""
    method = layer._resolve_forward_method()
    function: Forward | None = getattr(method, "__func__", None)
    if function is not None:
        return function

    def resolve_and_call(layer: Layer, /, *args: Any, **kwargs: Any) -> Any:
        return layer._resolve_forward_method()(*args, **kwargs)

    return resolve_and_call


def overridden(cls: type, base: type) -> set[str]:
    """The forwards that a subclass defines for itself, ``__call__`` included."""
    names: set[str] = set()
    for klass in cls.__mro__[: cls.__mro__.index(base)]:
        names |= {name for name in vars(klass) if name.startswith("forward") or name in ("__call__", "_resolve_forward_method")}
    return names


#: The names of an MLP's first matrix in SGLang's models, and its outputs per activation.
_FIRST_MATRICES = {"gate_up_proj": 2, "up_proj": 1, "fc1": 1, "c_fc": 1}


def _intermediate_size(parent: nn.Module) -> int | None:
    """The width of the activations behind an MLP's first matrix, on this rank."""
    for name, halves in _FIRST_MATRICES.items():
        width = getattr(getattr(parent, name, None), "output_size_per_partition", None)
        if isinstance(width, int):
            return width // halves
    return None


def _num_experts(parent: nn.Module) -> int | None:
    """How many experts the router beside a layer of experts chooses from."""
    found = (getattr(child, "num_global_routed_experts", None) for child in parent.children())
    return next((count for count in found if isinstance(count, int)), None)


def _heads(parent: nn.Module) -> tuple[int, int] | None:
    """The heads of the query and of the key that an attention layer has on this rank, as SGLang's models name them."""
    latent = getattr(parent, "num_local_heads", None)  # of latent attention, whose key has one head
    query, key = (latent, 1) if latent is not None else (getattr(parent, name, None) for name in ("num_heads", "num_kv_heads"))
    return (query, key) if isinstance(query, int) and isinstance(key, int) else None


def _fuses_activation(parent: nn.Module) -> bool:
    """Whether an MLP has a kernel for SiLU and FP8 quantisation, and a last matrix that takes its result (Llama, Qwen2; Blackwell)."""
    return getattr(getattr(parent, "activation_quant", None), "enabled", False) is True


def _is_on_npu(switch: str) -> bool:
    """Whether a switch that SGLang reads in its forwards for an NPU is on there."""
    from sglang.srt.environ import envs
    from sglang.srt.utils import is_npu

    return is_npu() and bool(getattr(envs, switch).get())
