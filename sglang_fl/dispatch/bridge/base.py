# SPDX-License-Identifier: Apache-2.0
"""What every bridge does: tell which layers it can take over, and build their forward."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..logger_manager import dispatch_log
from .catalog import LAYERS

Forward = Callable[..., Any]
#: Where a layer keeps what implementations are called with in its place, if that is not the layer itself.
OBJ = "_sglang_fl_obj"
#: An instance of one of SGLang's layer classes, which are not imported here.
Layer = Any


@dataclass(frozen=True)
class Site:
    """Where a layer stands: what its trial needs to know beyond the layer itself.

    Attributes:
        dtype: the model's activation dtype.
        device: where the model lies.
        intermediate_size: the width of the activations in this part of the model, if known.
        num_experts: how many experts this part of the model routes between, if known.
        fuses_activation: whether SGLang computes this part's activation together with what follows, as long as the layer is its own.
    """

    dtype: torch.dtype
    device: torch.device
    intermediate_size: int | None = None
    num_experts: int | None = None
    fuses_activation: bool = False


class Contexts(Protocol):
    """``active`` is not zero while a policy context is open somewhere in the process."""

    active: int


class NoContexts:
    """For a forward that is itself what a context asked for."""

    active = 0


#: How often calls go to SGLang, since the operator cannot say what they ask for, before nobody looks any more.
LEFT_BEFORE_IT_IS_SO = 8


class Watched:
    """An implementation's function that knows whether the calls meant for it reach it."""

    def __init__(self, fn: Forward):
        self._fn = fn
        self._returned = self._raised = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self._fn(*args, **kwargs)
        except BaseException:
            self._raised += 1
            raise
        self._returned += 1
        return result

    def record(self, name: str, destination: str, forward: Forward, /, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """Call a forward that ends in this function or in SGLang's own, and put on record where; a failure is for who takes over.

        Returns:
            (its result, whether it went to SGLang without an attempt).
        """
        returned, raised = self._returned, self._raised
        result = forward(*args, **kwargs)
        is_left = (self._returned, self._raised) == (returned, raised)
        if is_left:
            destination = f"sglang({destination} cannot say what it is called with)"
        if is_left or self._returned > returned:
            dispatch_log().record(name, destination)
        return result, is_left


def recorded(name: str, destination: str, fn: Forward, /, *args: Any, **kwargs: Any) -> Any:
    """Call a function, and put on record that it served."""
    result = fn(*args, **kwargs)
    dispatch_log().record(name, destination)
    return result


@dataclass(frozen=True)
class Routes:
    """Where a bound forward may send a call.

    Attributes:
        fn: the implementation in force, called as the operator's signature says.
        dtypes: the activation dtypes that it takes, None: all. A few models call a layer in another
            dtype than their own; such a call goes to ``own``.
        own: SGLang's forward for the layer's class: ``own(layer, *sglang_args)``.
        contexts: tells whether a policy context is open.
        divert: takes the call then: ``divert(layer, *sglang_args)``.
        failed: takes a call in which ``fn`` raised: ``failed(layer, error, operator_args, sglang_args, **named)``, with what
            both have by name.
    """

    fn: Forward
    dtypes: frozenset[torch.dtype] | None
    own: Forward
    contexts: Contexts
    divert: Forward
    failed: Forward


class Bridge(ABC):
    """Between one SGLang layer class and one operator."""

    op: ClassVar[str]
    #: The class whose forward the bridge speaks for; None: the operator's first.
    class_name: ClassVar[str | None] = None
    #: Whether a model's layers share one object of the class.
    shared: ClassVar[bool] = False
    #: SGLang's variable by which a user keeps the class's plain-PyTorch forward on an NPU.
    npu_switch: ClassVar[str | None] = None

    @property
    def layer_class(self) -> type[nn.Module] | None:
        """SGLang's class, or None where its module is not imported: then no layer of it exists."""
        module, name = next(layer for layer in LAYERS[self.op] if self.class_name in (None, layer[1]))
        found: type[nn.Module] | None = getattr(sys.modules.get(module), name, None)
        return found

    def parameters(self, layer: Layer) -> Iterator[nn.Parameter]:
        """The weights that it reads, which may be another module's."""
        return layer.parameters()

    def reason_to_leave(self, layer: Layer) -> str | None:
        """Why the standard signature cannot say what this layer computes, or None."""
        base = self.layer_class
        assert base is not None
        changed = sorted(overridden(type(layer), base))
        if changed:
            return f"{type(layer).__name__} overrides {', '.join(changed)}"
        if "forward" in vars(layer):
            return "its forward was replaced"
        if self.npu_switch is not None and _is_on_npu(self.npu_switch):
            return f"{self.npu_switch} is set"
        return self._reason_in_attributes(layer)

    def reason_at(self, site: Site) -> str | None:
        """Why a layer that stands there is left to SGLang, or None."""
        return None

    @abstractmethod
    def _reason_in_attributes(self, layer: Layer) -> str | None: ...

    @abstractmethod
    def trial_key(self, layer: Layer, site: Site) -> tuple[Any, ...]:
        """Equal for layers that one trial speaks for."""

    @abstractmethod
    def trial(self, layer: Layer, site: Site, fn: Forward) -> None:
        """Run ``fn`` as serving will, on scratch tensors of the layer's size and dtype.

        Raises:
            Exception: what ``fn`` raised, or a TypeError or ValueError that says how its result
                breaks the operator's contract.
        """

    @abstractmethod
    def forward(self, routes: Routes) -> Forward:
        """A forward for the layer class, as a function of the layer and SGLang's arguments.

        It is called for every token served: everything that can be settled here is.
        """


def overridden(cls: type, base: type) -> set[str]:
    """The forwards that a subclass defines for itself, ``__call__`` included."""
    names: set[str] = set()
    for klass in cls.__mro__[: cls.__mro__.index(base)]:
        names |= {name for name in vars(klass) if name.startswith("forward") or name in ("__call__", "_resolve_forward_method")}
    return names


def activation_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point type that most of the model's parameters have, quantised ones aside."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16, torch.float32):
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.get_default_dtype()


def device_of(model: nn.Module) -> torch.device:
    """Where a model lies."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def check_result(what: str, result: Any, like: torch.Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raises TypeError or ValueError unless ``result`` is a finite tensor of that shape, dtype and device."""
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"{what} is {type(result).__name__}, not a tensor")
    wanted = tuple(like.shape) if shape is None else shape
    if tuple(result.shape) != wanted:
        raise ValueError(f"{what} has shape {tuple(result.shape)}, not {wanted}")
    if result.dtype != like.dtype or result.device != like.device:
        raise ValueError(f"{what} is {result.dtype} on {result.device}, not {like.dtype} on {like.device}")
    if not result.isfinite().all():
        raise ValueError(f"{what} holds inf or nan, for inputs between -1 and 1")


def _is_on_npu(switch: str) -> bool:
    """Whether a switch that SGLang reads in its forwards for an NPU is on there."""
    from sglang.srt.environ import envs
    from sglang.srt.utils import is_npu

    return is_npu() and bool(getattr(envs, switch).get())


def scratch(site: Site, *shape: int) -> torch.Tensor:
    """A tensor with values in [-1, 1]. Not random: drawing would move the model's random numbers."""
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 1, count, dtype=torch.float32, device=site.device).reshape(shape).to(site.dtype)
