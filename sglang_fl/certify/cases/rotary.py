# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .. import exact
from .call import Call, Draw, Layer, Named, Operator, inputs_of, scaled_rows


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
    yield from scaled_rows(call)


OPERATORS = {
    "rotary_embedding": Operator(
        _rotary_embedding_forms,
        _rotary_embedding_unusual,
        _rotary_embedding_special,
        lambda call: exact.rotary_embedding(*inputs_of(call, "query", "key", "cos", "sin", "position_ids", "rotary_interleaved")),
    ),
}
