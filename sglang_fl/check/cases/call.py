# SPDX-License-Identifier: Apache-2.0
"""A case's parts: a call of an operator, and its random inputs.

Inputs are drawn on the CPU, so that a seed means the same numbers on every device.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Self

import torch
from torch import nn

#: More numbers than this are drawn as repetitions of so many, a prime: rows differ.
_DRAWN = 16777213
#: Offsets beyond it do not fit into 32 bits.
INT32 = 2**31


class NoMemory(RuntimeError):
    """The device lacks the memory that a case needs."""


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
        takes_layer: False for operators that replace functions of SGLang.
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

    def of_tokens(self, tokens: slice | torch.Tensor, tokens_in: Mapping[str, int]) -> "Call":
        """The call for some of its tokens."""
        found = {name: (self.inputs[name], dim) for name, dim in tokens_in.items() if name in self.inputs}
        parts = {name: x[(..., tokens) if dim == -1 else tokens] for name, (x, dim) in found.items()}
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

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        count = math.prod(shape)
        x = self.place(torch.randn(min(count, _DRAWN), generator=self.rng).mul_(scale).add_(offset), dtype)
        return (x if count <= _DRAWN else x.repeat(-(-count // _DRAWN))[:count]).view(shape)

    def place(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return x.to(dtype or self.dtype).to(self.device)

    def index(self, numbers: Any, dtype: str) -> torch.Tensor:
        return torch.as_tensor(numbers).to(getattr(torch, dtype)).to(self.device)

    def extreme(self, values: str, *shape: int, largest: float = math.inf) -> torch.Tensor:
        """Numbers in fp32 on the CPU, with special values among them: ``nan``, the ``largest`` of the dtype, ``zeros``, ``denormals``."""
        if values == "nan":
            x = torch.randn(shape, generator=self.rng)
            x[0, ..., 3], x[1, ..., 5], x[2, ..., 7], x[3, ..., 0] = math.nan, math.inf, -math.inf, math.inf
            return x
        info = torch.finfo(self.dtype)
        scale = {"largest": min(info.max, largest), "zeros": 0.0, "denormals": info.smallest_normal}[values]
        return (torch.rand(shape, generator=self.rng) * 2 - 1) * scale

    def laid_out(self, x: torch.Tensor, layout: str, guarded: dict[str, torch.Tensor]) -> torch.Tensor:
        """The numbers in another place; what is around them there goes to ``guarded``."""
        turned = {"transposed": (-1, -2), "turned": (0, 1)}.get(layout)
        if turned is not None:
            return x.transpose(*turned).contiguous().transpose(*turned)
        if layout in ("", "one-row"):
            return x[:1].expand_as(x) if layout else x
        if layout == "far":
            return self._far_apart(x)
        if layout == "every-other":
            around = self.normal(2 * len(x), *x.shape[1:], dtype=x.dtype)
            view, guarded[f"the rows between, {len(guarded)}"] = around[::2], around[1::2]
        else:  # in the columns of a wider tensor, from one on that is aligned or from one that is not
            first = {"view": 64, "odd-view": 3}[layout]
            around = self.normal(*x.shape[:-1], x.shape[-1] + first + 61, dtype=x.dtype)
            before, view, behind = around.split([first, x.shape[-1], 61], -1)
            guarded |= {f"the columns before, {len(guarded)}": before, f"the columns behind, {len(guarded)}": behind}
        return view.copy_(x)

    def _far_apart(self, x: torch.Tensor) -> torch.Tensor:
        """Rows so far apart that the last one's offset does not fit into 32 bits; memory between them is never touched."""
        between = INT32 // (len(x) - 1) + 64
        try:
            memory = torch.empty((len(x) - 1) * between + x[0].numel(), dtype=x.dtype, device=self.device)
        except RuntimeError as error:
            raise NoMemory(f"{INT32 * x.itemsize >> 30} GiB are not to be had on {self.device}") from error
        return memory.as_strided(x.shape, (between, *x.stride()[1:])).copy_(x)


@dataclass(frozen=True)
class Form:
    """The sizes and options of calls: an operator's subclass has them as fields, and draws.

    Attributes:
        layout: how the activations lie in memory, see :meth:`Draw.laid_out`.
        values: the numbers of the activations, see :meth:`Draw.extreme`; empty: normal ones.
    """

    tokens: int = 7
    layout: str = ""
    values: str = ""

    def __call__(self, draw: Draw) -> Call:
        raise NotImplementedError

    def of(self, words: str) -> Self:
        """This form with what words say: ``tokens=65537 heads=7,1 residual``."""
        pairs = (word.partition("=") for word in words.split())
        return replace(self, **{name: _read(value, getattr(self, name)) for name, _, value in pairs})


def _read(value: str, default: Any) -> Any:
    if isinstance(default, bool):
        return True
    if isinstance(default, tuple):
        return tuple(int(number) for number in value.split(","))
    return type(default)(value)


def rows_of(table: str) -> list[str]:
    """A table's rows in words. Rows end at ``|``; ``{a,b}`` and ``{,a}`` stand for one row each, as in a shell."""
    found: list[str] = []
    for row in table.split("|") if table else ():
        parts = [part.split(",") if number % 2 else [part] for number, part in enumerate(re.split(r"{(.*?)}", row))]
        found += (" ".join("".join(choice).split()) for choice in product(*parts))
    return list(dict.fromkeys(found))


def each(table: str, words: str) -> str:
    """The table with these words at the end of each row."""
    return " | ".join(f"{row} {words}" for row in table.split("|"))


Make = Callable[[Draw], Call]


@dataclass(frozen=True)
class Operator:
    """What an operator is checked with. Cases are rows of words for its form, as in :func:`rows_of`.

    Attributes:
        form: what the rows change.
        forms: the ways serving calls it, but for the number of tokens.
        exact: its results in float64, for a call that has not run yet; inputs that are results last.
        sizes: what models call it with, and where numbers of rows, heads and offsets leave what kernels are first tried with.
        many: numbers of tokens, or of rows, beyond what 16 bits count and a grid has in its second and third dimension.
        vast: rows that a CPU takes too long for; of those with most numbers, some of the tokens are judged.
        unusual: calls that are allowed, and rare.
        special: calls with nan, infinity, the largest and the smallest numbers.
        whole: one of the results in float64 judges all of an implementation's.
        fewer: it is called with so many times fewer tokens than others, which have no states.
        captured: whether serving calls it under graph capture.
        tokens_in: the inputs that have a part for each token -> the dimension of the tokens, first or last; results have them
            in the first. Empty where tokens depend on each other.
    """

    form: Form
    forms: str
    exact: Callable[[Call], tuple[Any, ...]]
    sizes: str = ""
    many: str = ""
    vast: str = ""
    unusual: str = ""
    special: str = ""
    whole: bool = False
    fewer: int = 1
    captured: bool = True
    tokens_in: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One check of one implementation with one call.

    Attributes:
        name: the call in words; one of an operator, a kind of check and a dtype has it.
        other: makes a call of another number of tokens.
    """

    op: str
    check: str
    name: str
    dtype: str
    make: Make
    other: Make | None = None

    def draw(self, seed: int, device: torch.device, *, other: bool = False) -> Call:
        draw = Draw(torch.Generator().manual_seed(seed), getattr(torch, self.dtype), device)
        return self.other(draw) if other and self.other else self.make(draw)


def inputs_of(call: Call, names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(call.inputs.get(name) for name in names)
