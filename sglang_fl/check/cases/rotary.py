# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..exact import rotary as exact
from ..exact.judge import Exact
from .call import Call, Draw, Layer, Make, Named, Operator, inputs_of, scaled_rows


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
        # Models' bases are from 1e4 to 1e7; no two calls have the same tables, so that one's cannot pass for another's.
        base = 10 ** (4 + 3 * torch.rand((), generator=draw.rng))
        frequencies = base ** -(torch.arange(0, self.rotary_dim, 2) / self.rotary_dim)
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
            layout = f"{'interleaved' if interleaved else 'halves'}, {'in place' if inplace else 'not in place'}"
            yield f"no tokens, {layout}", replace(base, tokens=0)
            for head_dim, rotary_dim in ((80, 80), (128, 64), (96, 24), (34, 2), (256, 256)):
                yield f"{rotary_dim} of {head_dim} rotated, {layout}", replace(base, head_dim=head_dim, rotary_dim=rotary_dim)
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
    yield from scaled_rows(call)


class _SectionsLayer(Layer):
    """What mrotary_embedding reads of its layer."""

    def __init__(self, cache: torch.Tensor, head_size: int, interleaved: bool, sections: tuple[int, int, int], sections_interleaved: bool):
        super().__init__()
        self.cos_sin_cache, self.head_size, self.is_neox_style = cache, head_size, not interleaved
        self.mrope_section, self.mrope_interleaved = list(sections), sections_interleaved
        time, height, width = sections
        axes = [0] * time + [1] * height + [2] * width
        if sections_interleaved:
            axes = [0] * len(axes)
            axes[1 : 3 * height : 3] = [1] * len(axes[1 : 3 * height : 3])
            axes[2 : 3 * width : 3] = [2] * len(axes[2 : 3 * width : 3])
        self.axis_map = torch.tensor(axes, device=cache.device)


@dataclass(frozen=True)
class _Sections:
    """A call of mrotary_embedding: ``rows`` of positions, and what the layer says of them."""

    rotary: _Rotary
    sections: tuple[int, int, int]
    sections_interleaved: bool = False
    rows: int = 3
    flat: bool = True
    positions_apart: bool = False

    def __call__(self, draw: Draw) -> Call:
        plain = self.rotary(draw)
        return self.of(draw, plain, plain.inputs["query"], plain.inputs["key"])

    def of(self, draw: Draw, plain: Call, query: torch.Tensor, key: torch.Tensor) -> Call:
        rotary, tokens = self.rotary, query.shape[0]
        cache = torch.cat((plain.inputs["cos"], plain.inputs["sin"]), -1)
        layer = _SectionsLayer(cache, rotary.head_dim, rotary.interleaved, self.sections, self.sections_interleaved)
        rows = self.rows * (2 if self.positions_apart else 1)
        positions = draw.positions(rows * tokens, rotary.lowest, rotary.max_position, rotary.position_dtype).view(rows, tokens)
        positions = positions[:: 2 if self.positions_apart else 1]
        inputs = {
            "positions": positions if self.rows == 3 else positions[0],
            "query": query.flatten(1) if self.flat else query,
            "key": key.flatten(1) if self.flat else key,
        }
        return Call(layer, inputs, frozenset({"query", "key"}), {**plain.guarded, "the layer's cos_sin_cache": cache})


def _mrotary_embedding_forms(tokens: int, hidden: int) -> Iterator[Named]:
    heads = max(1, hidden // 128)
    plain = _Rotary(tokens, heads, max(1, heads // 4), 128, 128)
    yield f"{tokens} × {heads} heads, sections", _Sections(plain, (16, 24, 24))
    yield f"{tokens} × {heads} heads, sections interleaved", _Sections(plain, (24, 20, 20), True)
    yield f"{tokens} × {heads} heads, one row of positions", _Sections(plain, (16, 24, 24), rows=1)


#: (head_dim, rotary_dim, sections)
_RARE_SECTIONS = ((80, 80, (16, 12, 12)), (128, 64, (12, 10, 10)), (34, 6, (1, 1, 1)), (256, 256, (48, 40, 40)))


def _mrotary_embedding_unusual() -> Iterator[Named]:
    for interleaved in (False, True):
        for sections_interleaved in (False, True):
            base = _Rotary(interleaved=interleaved)
            layout = f"{'interleaved' if interleaved else 'halves'}, sections {'interleaved' if sections_interleaved else 'in order'}"
            yield f"no tokens, {layout}", _Sections(replace(base, tokens=0), (12, 10, 10), sections_interleaved)
            for head_dim, rotary_dim, sections in _RARE_SECTIONS:
                rotary = replace(base, head_dim=head_dim, rotary_dim=rotary_dim)
                yield f"{rotary_dim} of {head_dim} rotated, {layout}", _Sections(rotary, sections, sections_interleaved, flat=False)
    sections = (12, 10, 10)
    yield "sections of nothing but time", _Sections(_Rotary(), (32, 0, 0))
    yield "positions up to 262143", _Sections(_Rotary(max_position=262144, lowest=262000), sections)
    yield "positions in int32", _Sections(_Rotary(position_dtype=torch.int32), sections)
    yield "positions in every other row", _Sections(_Rotary(), sections, positions_apart=True)
    yield "7 heads, one of keys", _Sections(_Rotary(heads=7, kv_heads=1), sections)
    yield "contiguous query and key", _Sections(_Rotary(packed=False), sections)
    yield "cos and sin in bf16", _Sections(_Rotary(cache_dtype=torch.bfloat16), sections)


def _mrotary_embedding_special() -> Iterator[Named]:
    for name, make in _rotary_embedding_special():
        yield name, partial(_with_sections, make=make)


def _with_sections(draw: Draw, make: Make) -> Call:
    plain = make(draw)
    return _Sections(_Rotary(), (12, 10, 10)).of(draw, plain, plain.inputs["query"], plain.inputs["key"])


def _mrotary_embedding_exactly(call: Call) -> tuple[Exact, ...]:
    layer, positions = call.layer, call.inputs["positions"]
    assert isinstance(layer, _SectionsLayer)
    query, key = (
        call.inputs[name].reshape(positions.shape[-1], -1 if positions.numel() else 1, layer.head_size) for name in ("query", "key")
    )
    rows = positions if positions.dim() == 2 else positions.expand(3, -1)
    results = exact.mrotary_embedding(query, key, layer.cos_sin_cache, rows, layer.axis_map, not layer.is_neox_style)
    if call.inputs["query"].dim() == 3:
        return results
    flat = {name: call.inputs[name].shape for name in ("query", "key")}
    # In a row of many heads no place is passed on as it is, unless heads are rotated whole.
    return tuple(
        replace(
            result,
            value=result.value.reshape(flat[result.name]),
            terms=result.terms.reshape(flat[result.name]),
            lost=torch.as_tensor(result.lost).reshape(flat[result.name]),
            passed_on=None,
        )
        for result in results
    )


OPERATORS = {
    "rotary_embedding": Operator(
        _rotary_embedding_forms,
        _rotary_embedding_unusual,
        _rotary_embedding_special,
        lambda call: exact.rotary_embedding(*inputs_of(call, "query", "key", "cos", "sin", "position_ids", "rotary_interleaved")),
        tokens_in={"query": 0, "key": 0, "position_ids": 0},
    ),
    "mrotary_embedding": Operator(
        _mrotary_embedding_forms,
        _mrotary_embedding_unusual,
        _mrotary_embedding_special,
        _mrotary_embedding_exactly,
        tokens_in={"query": 0, "key": 0, "positions": -1},
    ),
}
