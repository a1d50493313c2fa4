# SPDX-License-Identifier: Apache-2.0
"""KV-cache slots of tokens: SGLang's page allocator, its request table, and the index lists that attention backends read.

All results are exact integers. The first dimension of a launch's grid is the number of requests; tensors may be longer.
Parameters are named as in SGLang's kernels.
"""

from typing import Any

import torch

Grid = tuple[int, ...]


def _requests(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token of concatenated requests: its request, and its position within the request."""
    lengths = lengths.long()
    request = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = lengths.cumsum(0) - lengths
    return request, torch.arange(len(request), device=lengths.device) - starts[request]


def _pages(lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    return (lengths.long() + page_size - 1) // page_size


def alloc_extend_kernel(
    grid: Grid,
    pre_lens_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    last_loc_ptr: torch.Tensor,
    free_page_ptr: torch.Tensor,
    out_indices: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    """Slots for the tokens from ``pre_lens`` to ``seq_lens``: first the rest of the request's last page, then free pages in order."""
    before, after = pre_lens_ptr[: grid[0]].long(), seq_lens_ptr[: grid[0]].long()
    request, place = _requests(after - before)
    position = before[request] + place
    full = _pages(before, page_size)
    new = _pages(after, page_size) - full
    of_request = position // page_size - full[request]
    page, is_new = (new.cumsum(0) - new)[request] + of_request, of_request >= 0
    slots = last_loc_ptr[request].long() + 1 + place
    slots[is_new] = free_page_ptr[page[is_new]].long() * page_size + position[is_new] % page_size
    out_indices[: len(slots)] = slots.to(out_indices.dtype)


def alloc_decode_kernel(
    grid: Grid,
    seq_lens_ptr: torch.Tensor,
    last_loc_ptr: torch.Tensor,
    free_page_ptr: torch.Tensor,
    out_indices: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    """A slot for one more token of each request: after its last one, or in the next free page."""
    lengths = seq_lens_ptr[: grid[0]].long()
    is_new = (lengths - 1) % page_size == 0
    slots = last_loc_ptr[: grid[0]].long() + 1
    slots[is_new] = free_page_ptr[: int(is_new.sum())].long() * page_size
    out_indices[: grid[0]] = slots.to(out_indices.dtype)


def get_last_loc_triton(
    req_to_token: torch.Tensor, req_pool_indices_tensor: torch.Tensor, prefix_lens_tensor: torch.Tensor
) -> torch.Tensor:
    """The slot of the last token of each request's prefix, or -1 for an empty prefix."""
    last = (prefix_lens_tensor.long() - 1).clamp(min=0)
    slots = req_to_token[req_pool_indices_tensor.long(), last].to(prefix_lens_tensor.dtype)
    return slots.masked_fill(prefix_lens_tensor <= 0, -1)


#: SGLang has a second kernel for devices on which the first one gives wrong results.
get_last_loc_triton_safe = get_last_loc_triton


def compute_position_triton(
    extend_prefix_lens: torch.Tensor, extend_seq_lens: torch.Tensor, extend_seq_lens_sum: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of each new token, and the start of each request. Prefixes that are not given are empty."""
    request, positions = _requests(extend_seq_lens)
    if len(extend_prefix_lens) == len(extend_seq_lens):
        positions = positions + extend_prefix_lens.long()[request]
    return positions, (extend_seq_lens.cumsum(0) - extend_seq_lens).to(torch.int32)


def assign_req_to_token_pool(
    grid: Grid,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    bs_upper: int,
) -> None:
    """Write each request's new slots into its row of the table, from ``start_offset`` to ``end_offset``."""
    start = start_offset[: grid[0]].long()
    request, place = _requests(end_offset[: grid[0]].long() - start)
    req_to_token[req_pool_indices[request].long(), start[request] + place] = out_cache_loc[: len(request)].to(req_to_token.dtype)


def create_flashinfer_kv_indices_triton(
    grid: Grid,
    req_to_token_ptr: torch.Tensor,
    req_pool_indices_ptr: torch.Tensor,
    page_kernel_lens_ptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_start_idx: torch.Tensor | None,
    kv_indices_ptr: torch.Tensor,
    req_to_token_ptr_stride: int,
    ENTRY_PAGE_SIZE: int = 1,
    TOKEN_BLOCK_PARALLEL: bool = False,
    token_mapping: torch.Tensor | None = None,
    **options: Any,
) -> None:
    """The concatenated slots of each request's tokens, at ``kv_indptr``. For a page table: the slots of each page in order."""
    request, place = _requests(page_kernel_lens_ptr[: grid[0]])
    position = place if kv_start_idx is None else place + kv_start_idx[request].long()
    entry = req_to_token_ptr[req_pool_indices_ptr[request].long(), position // ENTRY_PAGE_SIZE].long()
    slots = entry * ENTRY_PAGE_SIZE + position % ENTRY_PAGE_SIZE
    if token_mapping is not None:
        slots = torch.where(slots < 0, -1, token_mapping[slots.clamp(min=0)].long())
    kv_indices_ptr[kv_indptr[request].long() + place] = slots.to(kv_indices_ptr.dtype)


def create_chunked_prefix_cache_kv_indices(
    grid: Grid,
    req_to_token_ptr: torch.Tensor,
    req_pool_indices_ptr: torch.Tensor,
    chunk_start_idx_ptr: torch.Tensor,
    chunk_seq_lens_ptr: torch.Tensor,
    chunk_cu_seq_lens_ptr: torch.Tensor,
    chunk_kv_indices_ptr: torch.Tensor,
    req_to_token_ptr_stride: int,
) -> None:
    """The same for a chunk of each request's prefix."""
    create_flashinfer_kv_indices_triton(
        grid,
        req_to_token_ptr,
        req_pool_indices_ptr,
        chunk_seq_lens_ptr,
        chunk_cu_seq_lens_ptr,
        chunk_start_idx_ptr,
        chunk_kv_indices_ptr,
        req_to_token_ptr_stride,
    )
