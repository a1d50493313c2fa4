# SPDX-License-Identifier: Apache-2.0
"""The KV cache slot of each token: loops over requests and tokens, in Python integers.

Index tensors may be longer than the grid: a request has one program.
"""

from collections.abc import Iterable

import torch

from .judge import Same


def _requests(grid: tuple[int, ...], *indices: torch.Tensor) -> Iterable[tuple[int, ...]]:
    """The numbers of each request."""
    return zip(*(index.tolist()[: grid[0]] for index in indices), strict=True)


def alloc(
    grid: tuple[int, ...],
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out: torch.Tensor,
    page_size: int,
    pre_lens: torch.Tensor | None = None,
) -> tuple[Same, ...]:
    """Token by token: the slot after the last one. Where a page begins: the first slot of the next free page."""
    slots, pages = [], iter(free_pages.tolist())
    for start, end, slot in _requests(grid, seq_lens - 1 if pre_lens is None else pre_lens, seq_lens, last_loc):
        for position in range(start, end):
            slot = next(pages) * page_size if position % page_size == 0 else slot + 1
            slots.append(slot)
    value = out.cpu().clone()
    value[: len(slots)] = torch.tensor(slots, dtype=torch.int64)
    return (Same("out_indices", value),)


def last_slots(req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, prefix_lens: torch.Tensor) -> tuple[Same, ...]:
    table, places = req_to_token.cpu(), zip(req_pool_indices.tolist(), prefix_lens.tolist(), strict=True)
    slots = [int(table[row, prefix - 1]) if prefix else -1 for row, prefix in places]
    return (Same("slots", torch.tensor(slots, dtype=prefix_lens.dtype)),)


def positions(extend_prefix_lens: torch.Tensor, extend_seq_lens: torch.Tensor) -> tuple[Same, ...]:
    prefixes = extend_prefix_lens.tolist()
    found: list[int] = []
    starts = []
    for number, count in enumerate(extend_seq_lens.tolist()):
        starts.append(len(found))
        first = prefixes[number] if prefixes else 0
        found += range(first, first + count)
    return Same("positions", torch.tensor(found, dtype=torch.int64)), Same("starts", torch.tensor(starts, dtype=torch.int32))


def write_table(
    grid: tuple[int, ...],
    req_to_token: torch.Tensor,
    out_cache_loc: torch.Tensor,
    req_pool_indices: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
) -> tuple[Same, ...]:
    value, given = req_to_token.cpu().clone(), iter(out_cache_loc.tolist())
    for row, first, last in _requests(grid, req_pool_indices, start_offset, end_offset):
        for position in range(first, last):
            value[row, position] = next(given)
    return (Same("req_to_token", value),)


def read_table(
    grid: tuple[int, ...],
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    indptr: torch.Tensor,
    starts: torch.Tensor | None,
    kv_indices: torch.Tensor,
    ENTRY_PAGE_SIZE: int = 1,
    token_mapping: torch.Tensor | None = None,
) -> tuple[Same, ...]:
    """Write each request's slots to ``kv_indices``, from ``indptr`` on. ``token_mapping`` leaves -1 unchanged."""
    table, value = req_to_token.cpu(), kv_indices.cpu().clone()
    mapped = None if token_mapping is None else token_mapping.tolist()
    for row, count, first, start in _requests(grid, rows, lengths, indptr, torch.zeros_like(rows) if starts is None else starts):
        for token in range(start, start + count):
            slot = int(table[row, token // ENTRY_PAGE_SIZE]) * ENTRY_PAGE_SIZE + token % ENTRY_PAGE_SIZE
            value[first + token - start] = slot if mapped is None or slot < 0 else mapped[slot]
    return (Same("kv_indices", value),)
