# SPDX-License-Identifier: Apache-2.0
"""SGLang's kernels that allocate and look up slots of the KV cache. The dtype of a case is that of its indices."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..exact import slots as exact
from .call import Call, Draw, Form, Layer, Operator

#: Page numbers, and the slots in a table, are below this.
_PAGES = 10_000
#: This many guarded numbers lie before and after what a kernel writes.
_AROUND = 5


@dataclass(frozen=True)
class Requests(Form):
    """A batch of ``tokens`` requests, each with a prefix and new tokens.

    Attributes:
        layout: the layout of the request table; ``far`` or the default.
        lengths: the number of new tokens of each request. Empty: random, from 0 to ``most``.
        prefix: the largest prefix length.
        page: the number of tokens in a page.
        large: slot numbers exceed 32 bits.
        longer: the index tensors have one number more than the launch has programs.
    """

    lengths: tuple[int, ...] = ()
    most: int = 24
    prefix: int = 24
    page: int = 1
    large: bool = False
    longer: bool = False

    def _lengths(self, draw: Draw) -> tuple[list[int], list[int]]:
        """The lengths of the prefixes, and the numbers of new tokens. The sum of the latter is the same in all calls of a form."""
        rng = torch.Generator().manual_seed(self.tokens)
        drawn = torch.randint(self.most + 1, (self.tokens,), generator=rng)[torch.randperm(self.tokens, generator=draw.rng)]
        new = list(self.lengths) or drawn.tolist()
        return torch.randint(int(self.layout == "far"), self.prefix + 1, (len(new),), generator=draw.rng).tolist(), new

    def _index(self, draw: Draw, numbers: Sequence[int]) -> torch.Tensor:
        return draw.place(torch.tensor([*numbers, *([999] if self.longer else [])]))

    def _pages(self, draw: Draw, count: int) -> list[int]:
        """Distinct page numbers in random order."""
        first = 2**31 // self.page if self.large else 1
        return (first + torch.randperm(count + _PAGES, generator=draw.rng)[:count]).tolist()

    def _last(self, draw: Draw, lengths: Sequence[int]) -> list[int]:
        """The slot of each prefix's last token: a random page, and the token's position modulo the page size. No prefix: -1."""
        pages = self._pages(draw, len(lengths))
        return [page * self.page + (n - 1) % self.page if n else -1 for page, n in zip(pages, lengths, strict=True)]

    def _table(self, draw: Draw, rows: int) -> torch.Tensor:
        width = (self.prefix + max(self.lengths, default=self.most)) // self.page + 2
        first = 2**31 // self.page - _PAGES if self.large else 0
        numbers = first + torch.randint(0, _PAGES, (rows, width), generator=draw.rng)
        return draw.laid_out(draw.place(numbers, torch.int32), self.layout)

    def _rows(self, draw: Draw, count: int) -> list[int]:
        """Distinct rows of a table with ``count + 3`` rows; the last row is one of them."""
        rows: list[int] = torch.randperm(count + 3, generator=draw.rng)[:count].tolist()
        return rows if not rows or count + 2 in rows else [count + 2, *rows[1:]]


def _out(draw: Draw, count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """The kernel's output, a slice of a longer tensor whose other numbers are guarded."""
    around = draw.place(torch.randint(-99, -1, (count + 2 * _AROUND,), generator=draw.rng), dtype)
    draw.guarded["the numbers before"], out, draw.guarded["the numbers after"] = around.split([_AROUND, count, _AROUND])
    return out


def _launch(inputs: dict[str, Any], written: str, *named: str) -> Call:
    return Call(Layer(), inputs, frozenset({written}), updated=(written,), takes_layer=False, named=frozenset(named), returns=False)


def _power_of_2(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


@dataclass(frozen=True)
class Allocation(Requests):
    """Slots for new tokens. ``one``: for one new token of each request; ``seq_lens`` already count it."""

    one: bool = False

    def call(self, draw: Draw) -> Call:
        prefixes, new = self._lengths(draw)
        if self.one:
            prefixes, new = [prefix + count for prefix, count in zip(prefixes, new, strict=True)], [1] * len(new)
        ends = [prefix + count for prefix, count in zip(prefixes, new, strict=True)]
        inputs: dict[str, Any] = {"grid": (len(new),)} | ({} if self.one else {"pre_lens": self._index(draw, prefixes)})
        inputs |= {"seq_lens": self._index(draw, ends), "last_loc": self._index(draw, self._last(draw, prefixes))}
        free = self._pages(draw, sum(new) // self.page + len(new) + 1)
        inputs |= {"free_pages": draw.place(torch.tensor(free), torch.int64), "out": _out(draw, sum(new))}
        return _launch(inputs | {"bs_upper": _power_of_2(len(new)), "page_size": self.page}, "out")


@dataclass(frozen=True)
class LastSlots(Requests):
    def call(self, draw: Draw) -> Call:
        prefixes, _ = self._lengths(draw)
        rows = self._rows(draw, len(prefixes))
        table = self._table(draw, len(prefixes) + 3)
        inputs = {"req_to_token": table, "req_pool_indices": self._index(draw, rows), "prefix_lens": self._index(draw, prefixes)}
        return Call(Layer(), {"grid": None, **inputs}, takes_layer=False)


@dataclass(frozen=True)
class Positions(Requests):
    """The positions of new tokens. ``no_prefixes``: the tensor of prefix lengths is empty."""

    no_prefixes: bool = False

    def call(self, draw: Draw) -> Call:
        prefixes, new = self._lengths(draw)
        given = [] if self.no_prefixes else prefixes
        inputs = {"grid": None, "extend_prefix_lens": self._index(draw, given), "extend_seq_lens": self._index(draw, new)}
        return Call(Layer(), inputs | {"extend_seq_lens_sum": sum(new)}, takes_layer=False)


@dataclass(frozen=True)
class WriteTable(Requests):
    def call(self, draw: Draw) -> Call:
        prefixes, new = self._lengths(draw)
        ends = [prefix + count for prefix, count in zip(prefixes, new, strict=True)]
        table = self._table(draw, len(new) + 3)
        inputs = {
            "grid": (len(new),),
            "req_pool_indices": self._index(draw, self._rows(draw, len(new))),
            "req_to_token": table,
            "start_offset": self._index(draw, prefixes),
            "end_offset": self._index(draw, ends),
            "out_cache_loc": draw.place(torch.randint(_PAGES, (sum(new) + _AROUND,), generator=draw.rng), torch.int64),
            "pool_len": table.stride(0),
            "bs_upper": _power_of_2(len(new)),
        }
        return _launch(inputs, "req_to_token")


@dataclass(frozen=True)
class ReadTable(Requests):
    """The slots of each request's tokens, concatenated.

    Attributes:
        page: above 1, the table holds pages of this many tokens.
        starts: each request starts at a given token, not at its first.
        mapped: each slot is translated by ``token_mapping``; -1 stays -1.
        blocks: the number of programs per request. 0: a one-dimensional grid.
        chunked: the call is of the kernel for chunks of prefixes.
        wide: slots are written as int64, not int32.
    """

    starts: bool = False
    mapped: bool = False
    blocks: int = 0
    chunked: bool = False
    wide: bool = False

    def call(self, draw: Draw) -> Call:
        starts, counts = self._lengths(draw)
        if not (self.starts or self.chunked):
            starts = [0] * len(counts)
        table = self._table(draw, len(counts) + 3)
        if self.mapped:
            table[torch.rand(table.shape, generator=draw.rng).to(table.device) < 0.1] = -1
        rows, begin = self._index(draw, self._rows(draw, len(counts))), [2 + end for end in accumulate(counts, initial=0)]
        lengths, indptr, at = self._index(draw, counts), self._index(draw, begin), self._index(draw, starts)
        out = _out(draw, sum(counts) + 4, torch.int64 if self.wide or self.large else torch.int32)
        inputs: dict[str, Any] = {
            "grid": (len(counts), self.blocks) if self.blocks else (len(counts),),
            "req_to_token": table,
            "rows": rows,
        }
        last = {"kv_indices": out, "stride": table.stride(0)}
        if self.chunked:
            return _launch({**inputs, "starts": at, "lengths": lengths, "indptr": indptr, **last}, "kv_indices")
        inputs |= {"lengths": lengths, "indptr": indptr, "starts": at if self.starts else None, **last}
        named: dict[str, Any] = {"ENTRY_PAGE_SIZE": self.page} if self.page > 1 else {}
        named |= {"TOKEN_BLOCK_PARALLEL": True} if self.blocks else {}
        if self.mapped:
            named["token_mapping"] = draw.place(torch.randperm(_PAGES, generator=draw.rng), torch.int64)
        return _launch(inputs | named, "kv_indices", *named)


def _operator(form: Requests, forms: str, exactly: Any, *, sizes: str, unusual: str) -> Operator:
    return Operator(
        form,
        forms,
        exactly,
        sizes=sizes,
        many="tokens={4097,65537} most=2",
        unusual=f"tokens=0 | lengths=0,0,0 | lengths=1,0,1 prefix=0 | {unusual}",
        compiled=False,
        captured=False,
        dtypes=(torch.int64, torch.int32),
    )


_LONG = "lengths=8192,1,4095"
_ALLOC, _MEMORY = "sglang.kernels.ops.memory.allocator", "sglang.kernels.ops.memory.common"
_KV = "sglang.kernels.ops.attention.kv_indices"
_LAST = _operator(
    LastSlots(),
    "",
    exact.last_slots,
    sizes="prefix=9000 | lengths=3,2 layout=far",
    unusual="prefix=1",
)

OPERATORS = {
    f"{_ALLOC}:alloc_extend_kernel": _operator(
        Allocation(page=16),
        "page={16,64}",
        exact.alloc,
        sizes=f"{_LONG} page={{16,64}} | lengths=4096,8192,12288 page=16 | page=64 prefix=9000",
        unusual="page={1,2,256} | longer | page=64 large",
    ),
    f"{_ALLOC}:alloc_decode_kernel": _operator(
        Allocation(page=16, one=True),
        "page={16,64}",
        exact.alloc,
        sizes="page=64 prefix=9000",
        unusual="page={1,2,256} | longer | page=64 large",
    ),
    f"{_MEMORY}:get_last_loc_triton": _LAST,
    f"{_MEMORY}:get_last_loc_triton_safe": _LAST,
    "sglang.kernels.ops.attention.position:compute_position_triton": _operator(
        Positions(),
        "{,no_prefixes}",
        exact.positions,
        sizes=f"{_LONG} prefix=262144 | lengths=70000,3",
        unusual="lengths=0,0 no_prefixes",
    ),
    "sglang.srt.mem_cache.allocation:assign_req_to_token_pool": _operator(
        WriteTable(),
        "",
        exact.write_table,
        sizes=f"{_LONG} | prefix=9000 | lengths=3,2 layout=far",
        unusual="lengths=32,33,31 | longer",
    ),
    f"{_KV}:create_flashinfer_kv_indices_triton": _operator(
        ReadTable(),
        "{,starts,starts mapped wide}",
        exact.read_table,
        sizes=f"{_LONG} {{,starts}} | lengths=511,512,513 | lengths=3,2 layout=far",
        unusual="page={4,16} {,starts} wide | page=64 large | blocks=3 | lengths=1500,1,0 blocks=2 | longer | mapped",
    ),
    f"{_KV}:create_chunked_prefix_cache_kv_indices": _operator(
        ReadTable(chunked=True),
        "",
        exact.read_table,
        sizes=f"{_LONG} | lengths=511,512,513 prefix=9000 | lengths=3,2 layout=far",
        unusual="longer",
    ),
}
