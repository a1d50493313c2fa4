# SPDX-License-Identifier: Apache-2.0
"""The KV cache slot of each token: loops over requests and tokens, in Python integers."""

from collections.abc import Iterable, Sequence

import torch

from .judge import Same


def _written(name: str, before: torch.Tensor, numbers: Iterable[int]) -> Same:
    """``before`` with its first numbers replaced; the others must not change."""
    value, new = before.cpu().clone(), torch.tensor(list(numbers), dtype=torch.int64)
    value[: len(new)] = new
    return Same(name, value)


def alloc_extend(
    before: Sequence[int], after: Sequence[int], last: Sequence[int], free: Sequence[int], out: torch.Tensor, page_size: int
) -> tuple[Same, ...]:
    """Token by token: the slot after the last one. Where a page begins: the first slot of the next free page."""
    slots, pages = [], iter(free)
    for start, end, slot in zip(before, after, last, strict=True):
        for position in range(start, end):
            slot = next(pages) * page_size if position % page_size == 0 else slot + 1
            slots.append(slot)
    return (_written("out_indices", out, slots),)


def last_slots(table: torch.Tensor, rows: Sequence[int], prefixes: torch.Tensor) -> tuple[Same, ...]:
    table = table.cpu()
    slots = [int(table[row, prefix - 1]) if prefix else -1 for row, prefix in zip(rows, prefixes.tolist(), strict=True)]
    return (Same("slots", torch.tensor(slots, dtype=prefixes.dtype)),)


def positions(prefixes: Sequence[int], new: Sequence[int]) -> tuple[Same, ...]:
    found: list[int] = []
    starts = []
    for number, count in enumerate(new):
        starts.append(len(found))
        first = prefixes[number] if prefixes else 0
        found += range(first, first + count)
    return Same("positions", torch.tensor(found, dtype=torch.int64)), Same("starts", torch.tensor(starts, dtype=torch.int32))


def write_table(
    table: torch.Tensor, slots: Sequence[int], rows: Sequence[int], start: Sequence[int], end: Sequence[int]
) -> tuple[Same, ...]:
    value, given = table.cpu().clone(), iter(slots)
    for row, first, last in zip(rows, start, end, strict=True):
        for position in range(first, last):
            value[row, position] = next(given)
    return (Same("req_to_token", value),)


def read_table(
    table: torch.Tensor,
    rows: Sequence[int],
    counts: Sequence[int],
    begin: Sequence[int],
    starts: Sequence[int],
    out: torch.Tensor,
    page_size: int,
    mapping: torch.Tensor | None,
) -> tuple[Same, ...]:
    """Write each request's slots to ``out`` from ``begin`` on. ``mapping`` leaves -1 unchanged."""
    table, value = table.cpu(), out.cpu().clone()
    mapped = None if mapping is None else mapping.tolist()
    for row, count, first, start in zip(rows, counts, begin, starts, strict=True):
        for token in range(start, start + count):
            slot = int(table[row, token // page_size]) * page_size + token % page_size
            value[first + token - start] = slot if mapped is None or slot < 0 else mapped[slot]
    return (Same("kv_indices", value),)
