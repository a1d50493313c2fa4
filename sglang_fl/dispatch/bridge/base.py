# SPDX-License-Identifier: Apache-2.0
"""Bridges: which of SGLang's layers an operator can replace, and the forward that does it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

Forward = Callable[..., Any]
#: How many tokens a layer's trial has.
TRIAL_TOKENS = 2


@dataclass(frozen=True)
class ModelContext:
    """What a bridge knows of the model around a layer.

    Attributes:
        dtype: the model's activation dtype.
        device: where the model lies.
        intermediate_size: the width of the activations in this part of the model, if known.
        num_experts: how many experts this part of the model routes between, if known.
        heads: of the query and of the key in this part of the model, on this rank, if known.
        fuses_activation: whether SGLang fuses this part's activation with the next operation, unless the layer is bound.
    """

    dtype: torch.dtype
    device: torch.device
    intermediate_size: int | None = None
    num_experts: int | None = None
    fuses_activation: bool = False
    heads: tuple[int, int] | None = None


class Routes(NamedTuple):
    """Where a bound forward may send a call. ``subject`` is the layer, or the hook of a function.

    Attributes:
        fn: the implementation in force, called as the operator's signature says.
        dtypes: the activation dtypes that it takes, None: all. A few models call a layer in another
            dtype than their own; such a call goes to ``own``.
        own: SGLang's forward: ``own(subject, *sglang_args)``.
        contexts: ``contexts.active`` is not zero while a policy context is open somewhere in the process.
        divert: takes the call then: ``divert(subject, *sglang_args)``.
        failed: takes a call in which ``fn`` raised: ``failed(subject, error, operator_args, sglang_args, **named)``, with what
            both have by name. Its result is the operator's, or what ``own`` returns.
    """

    fn: Forward
    dtypes: frozenset[torch.dtype] | None
    own: Forward
    contexts: Any
    divert: Forward
    failed: Forward


class Bridge(ABC):
    """Connects a layer class or a function of SGLang with one operator.

    ``subject`` is the layer; bridges of functions ignore it. ``context`` is a :class:`ModelContext`, or what the bridge of a
    function made of the model.

    Attributes:
        captured: whether SGLang calls it inside of graphs, where it captures any.
    """

    op: ClassVar[str]
    captured: ClassVar[bool] = True

    @abstractmethod
    def trial(self, subject: Any, context: Any, fn: Forward) -> None:
        """Run ``fn`` as serving will, on scratch tensors of the model's sizes and dtype.

        Raises:
            Exception: what ``fn`` raised, or a TypeError or ValueError that says how its result
                breaks the operator's contract.
        """

    @abstractmethod
    def forward(self, routes: Routes) -> Forward:
        """A function of the subject and SGLang's arguments, with SGLang's result.

        It runs for every token served: whatever can be decided once is decided here.
        """


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


def first_difference(of: Any, standard: Mapping[str, Any]) -> str | None:
    """``name=value`` of the first attribute with another value than the standard one, or None."""
    return next((f"{name}={getattr(of, name)}" for name, value in standard.items() if getattr(of, name) != value), None)


def scratch(context: ModelContext, *shape: int) -> torch.Tensor:
    """A tensor with values in [-1, 1]. Not random: drawing would move the model's random numbers."""
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 1, count, dtype=torch.float32, device=context.device).reshape(shape).to(context.dtype)


def check_result(what: str, result: Any, like: torch.Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raises TypeError or ValueError unless ``result`` is a finite tensor of that shape, dtype and device."""
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"{what} is {type(result).__name__}, not a tensor")
    expected = tuple(like.shape) if shape is None else shape
    if tuple(result.shape) != expected:
        raise ValueError(f"{what} has shape {tuple(result.shape)}, not {expected}")
    if result.dtype != like.dtype or result.device != like.device:
        raise ValueError(f"{what} is {result.dtype} on {result.device}, not {like.dtype} on {like.device}")
    if not result.isfinite().all():
        raise ValueError(f"{what} contains inf or nan, for inputs between -1 and 1")


def check_pair(result: Any, expected: str, prefix: str = "") -> tuple[Any, Any]:
    """Raises TypeError unless ``result`` is a tuple of two."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"{prefix}its result is {type(result).__name__}, not {expected}")
    return result
