# SPDX-License-Identifier: Apache-2.0
"""Records a served model's calls of layers and functions that implementations may replace, and repeats them with other numbers.

During recording SGLang computes them itself. The bridge converts the arguments to the operator's and passes them to a recording
function in place of an implementation. That refuses the call, and the fallback runs SGLang's own forward.
"""

import pickle
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..dispatch.bridge.base import Forward, Routes
from ..dispatch.bridge.socket import Socket, mark_as_ours
from ..dispatch.manager import is_capturing
from ..dispatch.policy import Overrides
from .aten_calls import is_contiguous, signature

#: The most recorded calls of an operator that are tried: of those in the measured cases, and of the others.
_MOST_CALLS, _MOST_OTHERS = 12, 4
#: A layer's tensors with more numbers than this are not saved for the checking process.
_MOST_KEPT = 1 << 26


class _Recorded(Exception):
    """Raised in place of an implementation's result."""


@dataclass(frozen=True)
class TensorSpec:
    """A reproducible tensor. Floating-point numbers are drawn at random; others are kept."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    data: torch.Tensor | None = None

    @classmethod
    def of(cls, x: torch.Tensor) -> "TensorSpec":
        data = None if x.is_floating_point() else x.detach().to("cpu", copy=True)
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device.type, data)

    def make(self, rng: torch.Generator, device: torch.device) -> torch.Tensor:
        place = torch.device("cpu") if self.device == "cpu" else device
        size = 0 if 0 in self.shape else 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if self.data is None:
            seed = int(torch.randint(1 << 62, (), generator=rng))
            drawn = torch.randn(size, dtype=torch.float32, device=place, generator=torch.Generator(place).manual_seed(seed))
            return drawn.to(self.dtype).as_strided(self.shape, self.stride)
        made = torch.empty(size, dtype=self.dtype, device=place).as_strided(self.shape, self.stride)
        return made.copy_(self.data) if size else made


@dataclass
class RecordedCall:
    """Calls of one operator with arguments of one kind.

    Attributes:
        subject: the layer, or the hook of a function; the first with such a call.
        arguments, named: the operator's arguments without the layer, with a :class:`TensorSpec` for each tensor.
        sglang_arguments: SGLang's arguments of the layer.
        counts: step -> number of calls.
    """

    socket: Socket
    subject: Any
    obj: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    sglang_arguments: tuple[Any, ...]
    counts: dict[str, int] = field(default_factory=dict)

    def calls(self, forward: Forward, count: int, device: torch.device) -> list[Callable[[], Any]]:
        """This many calls of a forward like SGLang's, each with its own tensors."""
        rng = torch.Generator().manual_seed(0)
        return [
            partial(forward, self.subject, *made(self.sglang_arguments, rng, device), **made(self.named, rng, device)) for _ in range(count)
        ]

    @property
    def nbytes(self) -> int:
        """The size of its tensors in bytes."""
        specs = [leaf for leaf in pytree.tree_leaves(self.sglang_arguments) if isinstance(leaf, TensorSpec)]
        return sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs)

    def describe(self) -> str:
        """``16x1024 bfloat16, None``"""
        return ", ".join(map(_in_words, (*self.arguments, *self.named.values())))

    def pickled(self) -> bytes:
        """Pickled for the checking process: the operator, its arguments, and the layer's attributes that it reads."""
        obj = None if self.obj is None else _state_of(self.obj)
        return pickle.dumps(
            {"op": self.socket.op, "obj": obj, "arguments": self.arguments, "named": self.named, "dtype": self.socket.dtype}
        )


class LayerRecorder:
    """Records the calls of sockets, from :meth:`start` until their forwards are bound again.

    Attributes:
        label: the current step.
        calls: by operator, class and arguments.
    """

    def __init__(self, sockets: Sequence[Socket]):
        self.label = ""
        self.calls: dict[tuple[Any, ...], RecordedCall] = {}
        self._sockets = sockets

    def start(self) -> None:
        for socket in self._sockets:
            if socket.prepare() is None:
                socket.install(self._forward(socket))

    def _forward(self, socket: Socket) -> Forward:
        own = socket.own

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise _Recorded

        def record(subject: Any, error: Exception, args: tuple[Any, ...], sglang_args: tuple[Any, ...], **named: Any) -> Any:
            if not isinstance(error, _Recorded):
                raise error
            self._count(socket, subject, args, sglang_args, named)
            return own(subject, *sglang_args, **named)

        return mark_as_ours(socket.bridge.forward(Routes(refuse, None, own, Overrides(), own, record)))

    def _count(self, socket: Socket, subject: Any, args: tuple[Any, ...], sglang_args: tuple[Any, ...], named: dict[str, Any]) -> None:
        has_layer = bool(args) and not isinstance(args[0], torch.Tensor)
        arguments = args[1:] if has_layer else args
        key = (socket.op, socket.name, socket.trial_key, *map(signature, arguments), *map(signature, named.values()))
        found = self.calls.get(key)
        if found is None:
            if is_capturing():
                return  # an index cannot be read during capture; the warm-up was recorded before
            kept = [_specs(some) for some in (arguments, named, sglang_args)]
            found = self.calls[key] = RecordedCall(socket, subject, args[0] if has_layer else None, *kept)
        found.counts[self.label] = found.counts.get(self.label, 0) + 1


def _specs(some: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, TensorSpec.of, some)


def made(some: Any, rng: torch.Generator, device: torch.device) -> Any:
    """Arguments with tensors in place of their specs."""
    return pytree.tree_map_only(TensorSpec, lambda spec: spec.make(rng, device), some)


def _state_of(obj: Any) -> dict[str, Any]:
    """The attributes of a layer or a hook that can be saved. Weights are under ``parameters``."""
    tensors = {**getattr(obj, "_parameters", {}), **getattr(obj, "_buffers", {})} if isinstance(obj, torch.nn.Module) else {}
    if not isinstance(obj, torch.nn.Module) and isinstance(weight := getattr(obj, "weight", None), torch.Tensor):
        tensors = {"weight": weight}
    names = [*vars(obj)] if hasattr(obj, "__dict__") else [name for name in dir(obj) if not name.startswith("_") and name not in tensors]
    kept = {}
    for name in names:
        value = getattr(obj, name)
        if not name.startswith("_") and not callable(value) and _is_small(value):
            kept[name] = value
    parameters = {name: x.detach().cpu() for name, x in tensors.items() if x is not None}
    if any(x.numel() > _MOST_KEPT for x in parameters.values()):
        raise ValueError("its weights are too large to save")
    return {"attributes": kept, "parameters": parameters}


def _is_small(value: Any) -> bool:
    """Whether a value can be saved and is not a module."""
    if isinstance(value, (torch.nn.Module, torch.Tensor)):
        return False
    try:
        return len(pickle.dumps(value)) < 1 << 16
    except Exception:  # a layer may hold any object
        return False


def _in_words(value: Any) -> str:
    if isinstance(value, TensorSpec):
        layout = "" if is_contiguous(value.shape, value.stride) else " strided"
        return f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}{layout}"
    if isinstance(value, (list, tuple)):  # what a router or a dispatcher returns has names
        return f"({', '.join(map(_in_words, value))})"
    return str(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def identity_of(key: tuple[Any, ...]) -> str:
    """All that makes a recorded call another one, as text that is the same in another process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(key))


def calls_to_try(calls: list[dict[str, Any]], cases: Set[str]) -> list[dict[str, Any]]:
    """Of an operator's calls sorted by size: the largest of the measured cases, and others of all sizes."""
    measured = [call for call in calls if cases & call["per_pass"].keys()]
    others = [call for call in calls if call not in measured]
    count = min(_MOST_OTHERS, len(others))
    chosen = sorted({round(number * (len(others) - 1) / max(1, count - 1)) for number in range(count)})
    return [*measured[:_MOST_CALLS], *(others[place] for place in chosen)]
