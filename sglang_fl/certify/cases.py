# SPDX-License-Identifier: Apache-2.0
"""What implementations are called with. An operator is one entry of :data:`OPERATORS_CHECKED`.

Inputs are drawn on the CPU, so that a seed means the same numbers on every device.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from . import exact
from .exact import Exact
from .words import COMPILE, GRAPH, INPUTS, REPEATS, SERVING, SPECIAL, THREADS, UNUSUAL

#: Tokens and hidden sizes: the full range on an accelerator, as much work as a CPU does in a minute, and a few seconds' worth.
_ACCELERATOR = ((1, 1024), (1, 4096), (16, 4096), (64, 8192), (512, 5120), (2048, 4096), (8192, 4096))
_CPU = ((1, 1024), (1, 4096), (16, 4096), (64, 2048), (512, 1024), (2048, 512), (8192, 256))
_QUICK = ((1, 1024), (64, 512))


class Layer(nn.Module):
    """The layer that an operator reads its weights from."""

    def __init__(self, weight: torch.Tensor | None = None, eps: float = 1e-6):
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = eps


@dataclass
class Call:
    """A call of an operator.

    Attributes:
        layer: its first argument.
        inputs: the other arguments, by the names and in the order of the operator's signature.
        may_write: the inputs that the operator's text allows writing.
        guarded: what lies around the inputs in memory and is never the operator's to write.
    """

    layer: Layer
    inputs: dict[str, Any]
    may_write: frozenset[str] = frozenset()
    guarded: dict[str, torch.Tensor] = field(default_factory=dict)

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
        exact: its results in float64, for a call that has not run yet.
    """

    forms: Callable[[int, int], Iterator[Named]]
    unusual: Callable[[], Iterator[Named]]
    special: Callable[[], Iterator[Named]]
    exact: Callable[[Call], tuple[Exact, ...]]


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


def cases_of(op: str, dtypes: frozenset[torch.dtype] | None, device: torch.device, *, quick: bool) -> Iterator[Case]:
    """An operator's cases, for the activation dtypes that an implementation takes (None: all)."""
    operator = OPERATORS_CHECKED[op]
    on_cpu = device.type == "cpu"
    sizes = _QUICK if quick else _CPU if on_cpu else _ACCELERATOR
    names = [str(dtype).removeprefix("torch.") for dtype in exact.DTYPES if dtypes is None or dtype in dtypes]
    names.sort(key=lambda name: name != "bfloat16")  # the dtype of serving first
    for dtype in names:
        case = partial(Case, op, dtype=dtype)
        for tokens, hidden in sizes:
            yield from (case(SERVING, name, make=make) for name, make in operator.forms(tokens, hidden))
        yield from (case(UNUSUAL, name, make=make) for name, make in operator.unusual())
        yield from (case(SPECIAL, name, make=make) for name, make in operator.special())
        yield from (case(INPUTS, name, make=make) for name, make in operator.forms(33, 1024))
        # In a batch that fills the device a race between a kernel's threads shows.
        busy = (256, 512) if on_cpu or quick else (8192, 4096)
        yield from (case(REPEATS, name, make=make) for name, make in operator.forms(*busy))
    for dtype in names[:1]:
        case = partial(Case, op, dtype=dtype)
        pairs = list(zip(operator.forms(64, 1024), operator.forms(17, 1024), strict=True))
        for check in (THREADS, GRAPH):
            yield from (case(check, name, make=make, other=other) for (name, make), (_, other) in pairs)
        # A compilation takes seconds: the plainest call and the one with most to get wrong.
        for (name, make), (_, other) in pairs[:1] if quick else {id(pair): pair for pair in (pairs[0], pairs[-1])}.values():
            yield case(COMPILE, name, make=make, other=None if on_cpu else other)


def _silu_and_mul_forms(tokens: int, hidden: int) -> Iterator[Named]:
    size = 3 * hidden if tokens <= 512 else hidden
    yield f"{tokens} × 2·{size}", partial(_drawn_activation, shape=(tokens, 2 * size))


def _activation(x: torch.Tensor, **guarded: torch.Tensor) -> Call:
    return Call(Layer(), {"x": x}, guarded=guarded)


def _drawn_activation(draw: Draw, shape: tuple[int, ...]) -> Call:
    return _activation(draw.normal(*shape, scale=4))


def _silu_and_mul_unusual() -> Iterator[Named]:
    for shape in ((0, 128), (2, 0, 64), (1, 2), (5, 66), (3, 10000), (4, 7, 512), (256,), (2, 3, 4, 32)):
        yield f"shape {shape}", partial(_drawn_activation, shape=shape)

    def every_other_row(draw: Draw) -> Call:
        x = draw.normal(14, 128)
        return _activation(x[::2], **{"the rows between": x[1::2]})

    def columns(draw: Draw) -> Call:
        x = draw.normal(6, 5, 192)
        return _activation(x[..., 64:128], **{"the columns before": x[..., :64], "the columns behind": x[..., 128:]})

    yield "every other row", every_other_row
    yield "columns of a wider tensor", columns
    yield "columns that begin at odd numbers", lambda draw: _activation(draw.normal(6, 67)[:, 3:])
    yield "transposed", lambda draw: _activation(draw.normal(64, 9).t())
    yield "one row for all", lambda draw: _activation(draw.normal(1, 64).expand(5, 64))


def _silu_and_mul_special() -> Iterator[Named]:
    def nan_and_infinity(draw: Draw) -> Call:
        gate, up = torch.randn(2, 6, 64, generator=draw.rng).abs() + 0.1
        gate[0, 3], up[1, 5], gate[2, 7] = torch.nan, torch.nan, torch.inf
        up[3, 0], up[4, 63] = torch.inf, -torch.inf
        return _activation(draw.place(torch.cat((gate, up), -1)))

    yield "nan and infinity", nan_and_infinity
    yield from _scaled_rows(lambda draw, x: _activation(draw.place(torch.cat((x, x.flip(-1).sign()), -1))))


def _scaled_rows(call: Callable[[Draw, torch.Tensor], Call], largest: float = torch.inf) -> Iterator[Named]:
    """Rows of the largest numbers of a dtype, of zeros, and of denormals."""

    def drawn(draw: Draw, scale: float) -> torch.Tensor:
        return (torch.rand(6, 64, generator=draw.rng) * 2 - 1) * scale

    def at_the_top(draw: Draw) -> Call:
        return call(draw, drawn(draw, min(torch.finfo(draw.dtype).max, largest)))

    yield "the largest numbers", at_the_top
    yield "zeros", lambda draw: call(draw, drawn(draw, 0.0))
    yield "denormals", lambda draw: call(draw, drawn(draw, torch.finfo(draw.dtype).smallest_normal))


def _norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None, **guarded: torch.Tensor) -> Call:
    if residual is None:
        return Call(Layer(weight), {"x": x}, guarded=guarded)
    return Call(Layer(weight), {"x": x, "residual": residual}, frozenset({"x", "residual"}), guarded)


def _drawn_norm(
    draw: Draw,
    shape: tuple[int, ...],
    residual: bool = False,
    scale: float = 3.0,
    weight_dtype: torch.dtype | None = None,
    eps: float = 1e-6,
) -> Call:
    x, weight = draw.normal(*shape, scale=scale), draw.normal(shape[-1], dtype=weight_dtype)
    call = _norm(x, weight, draw.normal(*shape, scale=10) if residual else None)
    call.layer.variance_epsilon = eps
    return call


def _rms_norm_forms(tokens: int, hidden: int) -> Iterator[Named]:
    yield f"{tokens} × {hidden}", partial(_drawn_norm, shape=(tokens, hidden))
    yield f"{tokens} × {hidden}, residual", partial(_drawn_norm, shape=(tokens, hidden), residual=True)


def _rms_norm_unusual() -> Iterator[Named]:
    for shape in ((0, 128), (2, 0, 64), (3, 1), (5, 33), (33, 80), (3, 5000), (3, 16384), (4, 7, 512), (128,), (2, 3, 4, 32)):
        yield f"shape {shape}", partial(_drawn_norm, shape=shape)
        yield f"shape {shape}, residual", partial(_drawn_norm, shape=shape, residual=True)
    for dtype in exact.DTYPES:
        yield f"weights in {dtype}", partial(_drawn_norm, shape=(7, 256), weight_dtype=dtype)
        yield f"weights in {dtype}, residual", partial(_drawn_norm, shape=(7, 256), weight_dtype=dtype, residual=True)
    for eps in (1e-5, 1e-2, 0.0):
        yield f"epsilon {eps}", partial(_drawn_norm, shape=(7, 256), scale=0.1, eps=eps)
    # Here epsilon decides.
    yield "small numbers", partial(_drawn_norm, shape=(7, 256), scale=1e-3)

    def heads_of_a_projection(draw: Draw) -> Call:
        qkv = draw.normal(9, 6 * 64)
        return _norm(qkv[:, :256].unflatten(1, (4, 64)), draw.normal(64), **{"the rest of the projection": qkv[:, 256:]})

    def columns(draw: Draw) -> Call:
        x = draw.normal(6, 5, 192)
        x, residual, rest = x[..., :64], x[..., 64:128], x[..., 128:]
        return _norm(x, draw.normal(64), residual, **{"the columns behind": rest})

    def every_other_row(draw: Draw) -> Call:
        x, residual = draw.normal(14, 128), draw.normal(14, 128)
        return _norm(x[::2], draw.normal(128), residual[1::2], **{"the rows between": x[1::2], "the residual's": residual[::2]})

    yield "heads of a packed projection", heads_of_a_projection
    yield "columns of a wider tensor, residual", columns
    yield "every other row, residual", every_other_row
    yield "transposed", lambda draw: _norm(draw.normal(64, 9).t(), draw.normal(64))
    yield "transposed, residual", lambda draw: _norm(draw.normal(5, 9, 64).transpose(0, 1), draw.normal(64), draw.normal(9, 5, 64))
    yield "weights not contiguous", lambda draw: _norm(draw.normal(9, 64), draw.normal(64, 2)[:, 0])


def _rms_norm_special() -> Iterator[Named]:
    def nan_and_infinity(draw: Draw, residual: bool) -> Call:
        x, other = torch.randn(2, 6, 64, generator=draw.rng)
        x[0, 3], x[1, 5], x[2, 7], x[3, 0], other[3, 0] = torch.nan, torch.inf, -torch.inf, torch.inf, -torch.inf
        return _norm(draw.place(x), draw.normal(64), draw.place(other) if residual else None)

    yield "nan and infinity", partial(nan_and_infinity, residual=False)
    yield "nan and infinity, residual", partial(nan_and_infinity, residual=True)
    # Beyond 1e18 the squares leave the range of fp32, in which the arithmetic is.
    yield from _scaled_rows(lambda draw, x: _norm(draw.place(x), draw.normal(64)), largest=1e17)


@dataclass(frozen=True)
class _Rotary:
    """A rotary call: sizes, layout and where its tensors lie."""

    tokens: int = 9
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 64
    interleaved: bool = False
    inplace: bool = True
    max_position: int = 4096
    lowest: int = 0
    packed: bool = True
    position_dtype: torch.dtype = torch.int64
    cache_dtype: torch.dtype = torch.float32
    halves: bool = True

    def __call__(self, draw: Draw) -> Call:
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        query, key, value = draw.normal(self.tokens, sum(sizes)).split(sizes, -1)
        query, key = query.unflatten(1, (self.heads, self.head_dim)), key.unflatten(1, (self.kv_heads, self.head_dim))
        if not self.packed:
            query, key = query.contiguous(), key.contiguous()
        return self.of(draw, query, key, **{"the values behind the keys": value})

    def of(self, draw: Draw, query: torch.Tensor, key: torch.Tensor, **guarded: torch.Tensor) -> Call:
        frequencies = 10000 ** -(torch.arange(0, self.rotary_dim, 2) / self.rotary_dim)
        angles = torch.outer(torch.arange(self.max_position), frequencies)
        cos, sin = draw.place(torch.cat((angles.cos(), angles.sin()), -1), self.cache_dtype).chunk(2, -1)
        inputs = {
            "query": query,
            "key": key,
            "cos": cos if self.halves else cos.contiguous(),
            "sin": sin if self.halves else sin.contiguous(),
            "position_ids": draw.positions(query.shape[0], self.lowest, self.max_position, self.position_dtype),
            "rotary_interleaved": self.interleaved,
            "inplace": self.inplace,
        }
        return Call(Layer(), inputs, frozenset({"query", "key"} if self.inplace else ()), guarded)


def _rotary_embedding_forms(tokens: int, hidden: int) -> Iterator[Named]:
    heads = max(1, hidden // 128)
    plain = _Rotary(tokens, heads, max(1, heads // 4), 128, 128)
    yield f"{tokens} × {heads} heads, in place", plain
    yield f"{tokens} × {heads} heads, interleaved, in place", replace(plain, interleaved=True)
    yield f"{tokens} × {heads} heads, not in place", replace(plain, inplace=False)


def _rotary_embedding_unusual() -> Iterator[Named]:
    for interleaved in (False, True):
        for inplace in (False, True):
            base = _Rotary(interleaved=interleaved, inplace=inplace)
            told = f"{'interleaved' if interleaved else 'halves'}, {'in place' if inplace else 'not in place'}"
            yield f"no tokens, {told}", replace(base, tokens=0)
            for head_dim, rotary_dim in ((80, 80), (128, 64), (96, 24), (34, 2), (256, 256)):
                yield f"{rotary_dim} of {head_dim} rotated, {told}", replace(base, head_dim=head_dim, rotary_dim=rotary_dim)
    yield "positions up to 262143", _Rotary(max_position=262144, lowest=262000)
    yield "positions in int32", _Rotary(position_dtype=torch.int32)
    yield "7 heads, one of keys", _Rotary(heads=7, kv_heads=1)
    yield "as many heads of keys", _Rotary(heads=3, kv_heads=3)
    yield "contiguous query and key", _Rotary(packed=False)
    yield "cos and sin apart", _Rotary(halves=False)
    yield "cos and sin in bf16", _Rotary(cache_dtype=torch.bfloat16)
    yield "cos and sin in fp16", _Rotary(cache_dtype=torch.float16)

    def heads_apart(draw: Draw) -> Call:
        wide_query, wide_key = draw.normal(5, 4, 96), draw.normal(5, 2, 80)
        around = {"the numbers behind each head of query": wide_query[..., 64:], "those of key": wide_key[..., 64:]}
        return _Rotary().of(draw, wide_query[..., :64], wide_key[..., :64], **around)

    def heads_first(draw: Draw) -> Call:
        return _Rotary().of(draw, draw.normal(4, 5, 64).transpose(0, 1), draw.normal(2, 5, 64).transpose(0, 1))

    yield "heads with gaps between", heads_apart
    yield "heads before tokens in memory", heads_first


def _rotary_embedding_special() -> Iterator[Named]:
    def call(draw: Draw, x: torch.Tensor) -> Call:
        query = draw.place(x).view(6, 1, 64).expand(6, 4, 64).contiguous()
        return _Rotary(inplace=False).of(draw, query, draw.normal(6, 2, 64))

    def nan_and_infinity(draw: Draw) -> Call:
        x = torch.randn(6, 64, generator=draw.rng)
        x[0, 3], x[1, 5], x[2, 40], x[3, 7] = torch.nan, torch.inf, -torch.inf, torch.inf
        return call(draw, x)

    yield "nan and infinity", nan_and_infinity
    yield from _scaled_rows(call)


def _rms_norm_exactly(call: Call) -> tuple[Exact, ...]:
    assert call.layer.weight is not None
    return exact.rms_norm(call.inputs["x"], call.layer.weight, call.layer.variance_epsilon, call.inputs.get("residual"))


def _inputs(call: Call, *names: str) -> tuple[Any, ...]:
    return tuple(call.inputs.get(name) for name in names)


#: operator -> what it is checked with. A new operator needs an entry here and nothing else.
OPERATORS_CHECKED: Mapping[str, Operator] = {
    "silu_and_mul": Operator(
        _silu_and_mul_forms,
        _silu_and_mul_unusual,
        _silu_and_mul_special,
        lambda call: exact.silu_and_mul(call.inputs["x"]),
    ),
    "rms_norm": Operator(
        _rms_norm_forms,
        _rms_norm_unusual,
        _rms_norm_special,
        _rms_norm_exactly,
    ),
    "rotary_embedding": Operator(
        _rotary_embedding_forms,
        _rotary_embedding_unusual,
        _rotary_embedding_special,
        lambda call: exact.rotary_embedding(*_inputs(call, "query", "key", "cos", "sin", "position_ids", "rotary_interleaved")),
    ),
}
