# SPDX-License-Identifier: Apache-2.0
"""The parts of a case: a call of an operator, and its random inputs.

Inputs are drawn on the CPU, so that a seed gives the same numbers on every device.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import product
from typing import Any, Self

import torch
from torch import nn

#: Larger tensors repeat this many random numbers. It is prime, so that rows differ.
_DRAWN = 16777213
#: Larger offsets do not fit into 32 bits.
INT32 = 2**31


class NoMemory(RuntimeError):
    """The device has too little memory for a case."""


class Layer(nn.Module):
    """A layer with the weights and constants that an operator reads."""

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
        inputs: the other arguments by name, in the order of the operator's signature.
        may_write: the inputs that the operator's docstring allows to write.
        guarded: memory around the inputs, which must not be written.
        updated: the inputs that are also results.
        takes_layer: False for operators that replace functions of SGLang.
        named: the inputs that are passed by name.
        returns: False if SGLang ignores the returned values.
        meaning: values for the exact results only, which the implementation has to derive from its arguments.
    """

    layer: Layer
    inputs: dict[str, Any]
    may_write: frozenset[str] = frozenset()
    guarded: dict[str, torch.Tensor] = field(default_factory=dict)
    updated: tuple[str, ...] = ()
    takes_layer: bool = True
    named: frozenset[str] = frozenset()
    returns: bool = True
    meaning: Mapping[str, Any] = field(default_factory=dict)

    def values(self, names: Collection[str]) -> dict[str, Any]:
        """The values of these names, without unknown ones: of ``meaning``, an input, or an attribute of the layer."""
        of_layer = {name: getattr(self.layer, name) for name in names if hasattr(self.layer, name)}
        return {name: value for name, value in {**of_layer, **self.inputs, **self.meaning}.items() if name in names}

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The operator's arguments: (positional, named)."""
        positional = (x for name, x in self.inputs.items() if name not in self.named)
        return (*((self.layer,) if self.takes_layer else ()), *positional), {name: self.inputs[name] for name in self.named}

    def of_tokens(self, tokens: slice | torch.Tensor, tokens_in: Mapping[str, int]) -> "Call":
        """The same call with only some of its tokens."""
        found = {name: (self.inputs[name], dim) for name, dim in tokens_in.items() if name in self.inputs}
        parts = {name: x[(..., tokens) if dim == -1 else tokens] for name, (x, dim) in found.items()}
        return replace(self, inputs={**self.inputs, **parts})

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that a kernel could write, by name."""
        found = {name: x for name, x in self.inputs.items() if isinstance(x, torch.Tensor)}
        return {**found, **self.guarded, **{f"the layer's {name}": x.data for name, x in self.layer.named_parameters()}}


@dataclass(frozen=True)
class Draw:
    """Draws a call's tensors on a device, in the activations' dtype.

    Attributes:
        guarded: the memory around them, by name.
    """

    rng: torch.Generator
    dtype: torch.dtype
    device: torch.device
    guarded: dict[str, torch.Tensor] = field(default_factory=dict)

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        count = math.prod(shape)
        x = self.place(torch.randn(min(count, _DRAWN), generator=self.rng).mul_(scale).add_(offset), dtype)
        return (x if count <= _DRAWN else x.repeat(-(-count // _DRAWN))[:count]).view(shape)

    def place(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return x.to(dtype or self.dtype).to(self.device)

    def index(self, numbers: Any, dtype: str) -> torch.Tensor:
        return torch.as_tensor(numbers).to(getattr(torch, dtype)).to(self.device)

    def extreme(self, values: str, *shape: int, largest: float = math.inf) -> torch.Tensor:
        """fp32 numbers on the CPU with some special values: ``nan``, the ``largest`` of the dtype, ``zeros``, ``denormals``."""
        if values == "nan":
            x = torch.randn(shape, generator=self.rng)
            x[0, ..., 3], x[1, ..., 5], x[2, ..., 7], x[3, ..., 0] = math.nan, math.inf, -math.inf, math.inf
            return x
        info = torch.finfo(self.dtype)
        scale = {"largest": min(info.max, largest), "zeros": 0.0, "denormals": info.smallest_normal}[values]
        return (torch.rand(shape, generator=self.rng) * 2 - 1) * scale

    def laid_out(self, x: torch.Tensor, layout: str) -> torch.Tensor:
        """Copy the numbers into another memory layout. The memory around them is added to ``guarded``."""
        guarded = self.guarded
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
        else:  # in the columns of a wider tensor, with an aligned or an unaligned first column
            first = {"view": 64, "odd-view": 3}[layout]
            around = self.normal(*x.shape[:-1], x.shape[-1] + first + 61, dtype=x.dtype)
            before, view, behind = around.split([first, x.shape[-1], 61], -1)
            guarded |= {f"the columns before, {len(guarded)}": before, f"the columns behind, {len(guarded)}": behind}
        return view.copy_(x)

    def _far_apart(self, x: torch.Tensor) -> torch.Tensor:
        """Rows so far apart that the last offset does not fit into 32 bits. The memory between them is never used."""
        between = INT32 // (len(x) - 1) + 64
        try:
            memory = torch.empty((len(x) - 1) * between + x[0].numel(), dtype=x.dtype, device=self.device)
        except RuntimeError as error:
            raise NoMemory(f"{INT32 * x.itemsize >> 30} GiB of memory are not available on {self.device}") from error
        return memory.as_strided(x.shape, (between, *x.stride()[1:])).copy_(x)


@dataclass(frozen=True)
class Form:
    """The sizes and options of a call. Subclasses add an operator's own as fields, and draw the call in ``call``.

    Attributes:
        layout: the memory layout of the activations, see :meth:`Draw.laid_out`.
        values: the special values in the activations, see :meth:`Draw.extreme`. Empty: none.
    """

    tokens: int = 7
    layout: str = ""
    values: str = ""

    def __call__(self, draw: Draw) -> Call:
        call = self.call(draw)
        call.guarded |= draw.guarded
        return call

    def call(self, draw: Draw) -> Call:
        raise NotImplementedError

    def drawn(self, draw: Draw, *shape: int, scale: float = 1.0, largest: float = math.inf) -> torch.Tensor:
        """Activations in this form's layout: random, or with its special values. See :meth:`Draw.extreme` for ``largest``."""
        x = draw.place(draw.extreme(self.values, *shape, largest=largest)) if self.values else draw.normal(*shape, scale=scale)
        return draw.laid_out(x, self.layout)

    def of(self, words: str) -> Self:
        """This form changed by words: ``tokens=65537 heads=7,1 residual``."""
        pairs = (word.partition("=") for word in words.split())
        return replace(self, **{name: _read(value, getattr(self, name)) for name, _, value in pairs})


def _read(value: str, default: Any) -> Any:
    if isinstance(default, bool):
        return True
    if isinstance(default, tuple):
        return tuple(int(number) for number in value.split(","))
    return type(default)(value)


def rows_of(table: str) -> list[str]:
    """Split a table into rows. Rows end at ``|``. ``{a,b}`` and ``{,a}`` give one row for each alternative, as in a shell."""
    found: list[str] = []
    for row in table.split("|") if table else ():
        parts = [part.split(",") if number % 2 else [part] for number, part in enumerate(re.split(r"{(.*?)}", row))]
        found += (" ".join("".join(choice).split()) for choice in product(*parts))
    return list(dict.fromkeys(found))


def each(table: str, words: str) -> str:
    """Append these words to each row of a table."""
    return " | ".join(f"{row} {words}" for row in table.split("|"))


Make = Callable[[Draw], Call]


@dataclass(frozen=True)
class Operator:
    """The inputs of an operator. Cases are rows of words that change its form, as in :func:`rows_of`.

    Attributes:
        form: the default form.
        forms: the calls of serving, except for the number of tokens.
        exactly: computes the results in float64. Its parameters are named as in :meth:`Call.values`. Inputs that are results come last.
        sizes: the sizes of models, and unusual numbers of rows, heads and offsets.
        many: more tokens or rows: past where kernels take another path, and beyond 16 bits, the limit of a grid's second and third
            dimension.
        vast: rows that take too long on a CPU. In the largest ones only some tokens are judged.
        unusual: allowed but rare calls.
        special: calls with nan, infinity, the largest and the smallest numbers.
        whole: one float64 result judges all results together.
        fewer: it gets this many times fewer tokens than operators without states.
        captured: whether serving calls it under graph capture.
        compiled: whether serving calls it inside of torch.compile.
        dtypes: the dtypes of the activations, or of the indices if there are no activations. The one used in serving is first.
        tokens_in: the inputs with a token dimension -> that dimension, first or last. Results have it first. Empty if tokens
            depend on each other.
    """

    form: Form
    forms: str
    exactly: Callable[..., tuple[Any, ...]]
    sizes: str = ""
    many: str = ""
    vast: str = ""
    unusual: str = ""
    special: str = ""
    whole: bool = False
    fewer: int = 1
    captured: bool = True
    compiled: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32, torch.float16)
    tokens_in: Mapping[str, int] = field(default_factory=dict)

    def exact(self, call: Call) -> tuple[Any, ...]:
        """The call's results in float64. Compute them before the call runs."""
        return self.exactly(**call.values(signature(self.exactly).parameters))


@dataclass(frozen=True)
class Case:
    """One check of one implementation with one call.

    Attributes:
        name: the call in words, unique for an operator, a kind of check and a dtype.
        other: makes a call with another number of tokens.
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
