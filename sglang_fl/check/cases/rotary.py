# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import Any

import torch

from ..exact import rotary as exact
from .call import Call, Draw, Form, Layer, Operator, each
from .models import MODELS, sizes


@dataclass(frozen=True)
class Rotary(Form):
    """A rotary call.

    Attributes:
        layout: of query and key. Empty: in a packed projection, before the values.
        rotary_dim: 0: the whole head is rotated.
        copy: not in place.
        positions, lowest: positions are from ``lowest`` to ``positions``.
        positions_apart: other positions lie between them, or between their rows. SGLang's drafts of one token (UNO, DSpark) have such ones.
        tables: the dtype of cos and sin.
        tables_apart: cos and sin are not halves of one table.
        tables_far: a position times their row stride does not fit into 32 bits.
        scale: of cos and sin, as in YaRN.
    """

    tokens: int = 9
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 0
    interleaved: bool = False
    copy: bool = False
    positions: int = 4096
    lowest: int = 0
    positions_apart: bool = False
    position_dtype: str = "int64"
    tables: str = "float32"
    tables_apart: bool = False
    tables_far: bool = False
    scale: float = 1.0

    def call(self, draw: Draw) -> Call:
        query, key = self._heads(draw)
        cos, sin = self._tables(draw)
        position_ids = self._positions(draw, query.shape[0])
        inputs: dict[str, Any] = {"query": query, "key": key, "cos": cos, "sin": sin, "position_ids": position_ids}
        inputs |= {"rotary_interleaved": self.interleaved, "inplace": not self.copy}
        return Call(Layer(), inputs, frozenset(() if self.copy else {"query", "key"}))

    def _heads(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        shapes = (self.heads, self.head_dim), (self.kv_heads, self.head_dim)
        if self.values:
            query = draw.place(draw.extreme(self.values, self.tokens, *shapes[0]))
            return query, draw.normal(self.tokens, *shapes[1])
        if not self.layout:
            widths = [self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2]
            query, key, draw.guarded["the values behind the keys"] = draw.normal(self.tokens, sum(widths)).split(widths, -1)
            return query.unflatten(1, shapes[0]), key.unflatten(1, shapes[1])
        layout = self.layout.removeprefix("contiguous")
        query, key = (draw.laid_out(draw.normal(self.tokens, *shape), layout) for shape in shapes)
        return query, key

    def _tables(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        rotary_dim = self.rotary_dim or self.head_dim
        # Models' bases are from 1e4 to 1e7. Each call has its own tables, so that a stale one is found.
        base = 10 ** (4 + 3 * torch.rand((), generator=draw.rng))
        frequencies = base ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
        angles = torch.outer(torch.arange(self.positions), frequencies)
        table = draw.place(torch.cat((angles.cos(), angles.sin()), -1) * self.scale, getattr(torch, self.tables))
        cos, sin = draw.laid_out(table, "far" if self.tables_far else "").chunk(2, -1)
        return (cos.contiguous(), sin.contiguous()) if self.tables_apart else (cos, sin)

    def _positions(self, draw: Draw, count: int, *shape: int) -> torch.Tensor:
        step = 2 if self.positions_apart else 1
        positions = torch.randint(self.lowest, self.positions, (count * step, *shape), generator=draw.rng)
        positions[..., :1] = self.positions - 1
        return draw.index(positions, self.position_dtype)[::step]


class SectionsLayer(Layer):
    """The attributes of the layer that mrotary_embedding reads."""

    def __init__(self, cache: torch.Tensor, head_size: int, interleaved: bool, sections: tuple[int, ...], sections_interleaved: bool):
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
class Sections(Rotary):
    """A call of mrotary_embedding with ``rows`` of positions.

    Attributes:
        sections: empty: a little less for height and width than for time, as in Qwen's models.
        turns: the sections' pairs are interleaved.
        by_head: query and key have a head dimension.
    """

    sections: tuple[int, ...] = ()
    turns: bool = False
    rows: int = 3
    by_head: bool = False

    def call(self, draw: Draw) -> Call:
        query, key = self._heads(draw)
        cache = torch.cat(self._tables(draw), -1)
        pairs = cache.shape[1] // 2
        side = 5 * pairs // 16 or pairs // 3
        sections = self.sections or (pairs - 2 * side, side, side)
        layer = SectionsLayer(cache, self.head_dim, self.interleaved, sections, self.turns)
        positions = self._positions(draw, self.rows, self.tokens)
        inputs = {
            "positions": positions if self.rows == 3 else positions[0],
            "query": query if self.by_head else query.flatten(1),
            "key": key if self.by_head else key.flatten(1),
        }
        return Call(layer, inputs, frozenset({"query", "key"}), {"the layer's cos_sin_cache": cache})


#: Multi-head, grouped and multi-query attention, and the head counts under tensor parallelism.
_HEADS = """
tokens=3 heads={9,17,32} kv_heads={1,9,17,32} | tokens=3 heads=128 kv_heads={1,8,16} | tokens=3 heads={1,5,7} kv_heads=1
| tokens=3 heads=64 kv_heads=32 | tokens=3 heads=8 kv_heads=5
"""
_MODELS = f"tokens=3 {{{sizes('heads', 'kv_heads', 'head_dim', 'rotary_dim')}}}"
_MANY = "tokens={1025,4097} | tokens=65537 heads=1 kv_heads=1 head_dim=16 {,rotary_dim=8}"
_LONGEST = f"positions={max(model.get('positions', 0) for model in MODELS)} lowest=262144 head_dim=16"
_VAST = "tokens=8192 heads=32 kv_heads=8 head_dim=128"
_POSITIONS = "positions=262144 lowest=262000 | position_dtype=int32 | positions=70000 lowest=65530 position_dtype=int32"
_UNUSUAL = """
tokens=0 | head_dim=80 | head_dim=128 rotary_dim=64 | head_dim=96 rotary_dim=24 | head_dim=34 rotary_dim=6 | head_dim=256
"""
_RARE = f"{_POSITIONS} | heads=7 kv_heads=1 | heads=3 kv_heads=3 | layout=contiguous | tables={{bfloat16,float16}} | positions_apart"
_SCALED = "scale=1.25 {,interleaved}"

OPERATORS = {
    "rotary_embedding": Operator(
        Rotary(),
        "heads=8 head_dim=128 {,interleaved,copy}",
        exact.rotary_embedding,
        sizes=f"{each(_HEADS, '{,interleaved,copy}')} | {_MODELS} | tokens=3 layout=far {{,copy}} | positions=40 tables_far | {_LONGEST}",
        many=each(_MANY, "{,copy,interleaved}"),
        vast=f"{_VAST} | tokens=1048577 heads=8 kv_heads=1 head_dim=256",
        unusual=f"{each(_UNUSUAL, '{,interleaved} {,copy}')} | {_RARE} | {_SCALED} | scale=1.25 copy | tables_apart"
        " | layout={view,every-other,turned}",
        special="tokens=6 copy values={nan,largest,zeros,denormals}",
        tokens_in={"query": 0, "key": 0, "position_ids": 0},
    ),
    "mrotary_embedding": Operator(
        Sections(),
        "heads=8 head_dim=128 {,turns,rows=1}",
        exact.mrotary_embedding,
        sizes=f"{each(_HEADS, '{,turns}')} | {_MODELS} | tokens=3 layout=far by_head | {_LONGEST}",
        many=each(_MANY, "{,turns,interleaved}"),
        vast=_VAST,
        unusual=f"{each(_UNUSUAL, '{,interleaved} {,turns} {,by_head}')} | {_RARE} | {_SCALED} | sections=32,0,0",
        special="tokens=6 values={nan,largest,zeros,denormals}",
        tokens_in={"query": 0, "key": 0, "positions": -1},
    ),
}
