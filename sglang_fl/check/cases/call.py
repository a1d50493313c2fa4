# SPDX-License-Identifier: Apache-2.0
"""What a case is made of: a call of an operator, and what draws its inputs.

Inputs are drawn on the CPU, so that a seed means the same numbers on every device.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn


class Layer(nn.Module):
    """The layer that an operator reads its weights and constants from."""

    def __init__(self, weight: torch.Tensor | None = None, eps: float = 1e-6, bias: torch.Tensor | None = None, approximate: str = "none"):
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.variance_epsilon = eps
        self.approximate = approximate


@dataclass
class Call:
    """A call of an operator.

    Attributes:
        layer: its first argument.
        inputs: the other arguments, by the names and in the order of the operator's signature.
        may_write: the inputs that the operator's text allows writing.
        guarded: what lies around the inputs in memory and is never the operator's to write.
        updated: the inputs that are results, too, as the operator leaves them.
        takes_layer: operators that stand for functions of SGLang take none.
    """

    layer: Layer
    inputs: dict[str, Any]
    may_write: frozenset[str] = frozenset()
    guarded: dict[str, torch.Tensor] = field(default_factory=dict)
    updated: tuple[str, ...] = ()
    takes_layer: bool = True

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the operator is called with: (by position, by name)."""
        return (*((self.layer,) if self.takes_layer else ()), *self.inputs.values()), {}

    def of_tokens(self, first: int, count: int, tokens_in: Mapping[str, int]) -> "Call":
        """The call for some of its tokens."""
        parts = {name: self.inputs[name].narrow(dim, first, count) for name, dim in tokens_in.items() if name in self.inputs}
        return replace(self, inputs={**self.inputs, **parts})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a kernel could write, by name."""
        found = {name: x for name, x in self.inputs.items() if isinstance(x, torch.Tensor)}
        return {**found, **self.guarded, **{f"the layer's {name}": x.data for name, x in self.layer.named_parameters()}}


@dataclass(frozen=True)
class Draw:
    """Draws a call's tensors on a device, in the activations' dtype."""

    rng: torch.Generator
    dtype: torch.dtype
    device: torch.device

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.place(torch.randn(shape, generator=self.rng) * scale, dtype)

    def place(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return x.to(dtype or self.dtype).to(self.device)

    def positions(self, tokens: int, low: int, high: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(low, high, (tokens,), generator=self.rng, dtype=dtype).to(self.device)


Make = Callable[[Draw], Call]
Named = tuple[str, Make]


@dataclass(frozen=True)
class Operator:
    """What an operator is checked with.

    Attributes:
        forms: the ways serving calls it, for a number of tokens and a hidden size.
        unusual: calls that are allowed, and rare.
        special: calls with nan, infinity, the largest and the smallest numbers.
        exact: its results in float64, for a call that has not run yet; inputs that are results last.
        whole: one of them judges all the results.
        captured: whether serving calls it under graph capture.
        tokens_in: the inputs that have a part for each token -> the dimension of the tokens; results have them in the
            first. Empty where tokens depend on each other.
    """

    forms: Callable[[int, int], Iterator[Named]]
    unusual: Callable[[], Iterator[Named]]
    special: Callable[[], Iterator[Named]]
    exact: Callable[[Call], tuple[Any, ...]]
    whole: bool = False
    captured: bool = True
    tokens_in: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One check of one implementation with one call; ``other`` makes a call of another number of tokens."""

    op: str
    check: str
    name: str
    dtype: str
    make: Make
    other: Make | None = None

    def draw(self, seed: int, device: torch.device, *, other: bool = False) -> Call:
        draw = Draw(torch.Generator().manual_seed(seed), getattr(torch, self.dtype), device)
        return self.other(draw) if other and self.other else self.make(draw)


def scaled_rows(call: Callable[[Draw, torch.Tensor], Call], largest: float = torch.inf) -> Iterator[Named]:
    """Rows of the largest numbers of a dtype, of zeros, and of denormals."""

    def drawn(draw: Draw, scale: float) -> torch.Tensor:
        return (torch.rand(6, 64, generator=draw.rng) * 2 - 1) * scale

    def at_the_top(draw: Draw) -> Call:
        return call(draw, drawn(draw, min(torch.finfo(draw.dtype).max, largest)))

    yield "the largest numbers", at_the_top
    yield "zeros", lambda draw: call(draw, drawn(draw, 0.0))
    yield "denormals", lambda draw: call(draw, drawn(draw, torch.finfo(draw.dtype).smallest_normal))


def inputs_of(call: Call, *names: str) -> tuple[Any, ...]:
    return tuple(call.inputs.get(name) for name in names)
