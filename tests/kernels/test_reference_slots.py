# SPDX-License-Identifier: Apache-2.0
"""The references that hand out and look up slots of the KV cache, against loops over requests and tokens."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_fl.kernels.reference import logits, slots

INTEGERS = st.sampled_from((torch.int32, torch.int64))
LENGTHS = st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23)), max_size=5)
PAGE_SIZES = st.sampled_from((1, 2, 3, 4, 16))
UNTOUCHED = -77


def table(rng: random.Random, rows: int, width: int) -> torch.Tensor:
    return torch.tensor([[rng.randrange(10_000) for _ in range(width)] for _ in range(rows)], dtype=torch.int32).view(rows, width)


@settings(max_examples=60)
@given(LENGTHS, PAGE_SIZES, INTEGERS, st.randoms(use_true_random=False))
def test_new_tokens_get_slots(lengths: list[tuple[int, int]], page_size: int, dtype: torch.dtype, rng: random.Random) -> None:
    before = [prefix for prefix, _ in lengths]
    after = [prefix + new for prefix, new in lengths]
    free = rng.sample(range(100, 400), 120)
    # The prefix's last slot stands where its position stands in a page.
    last = [rng.randrange(50) * page_size + (prefix - 1) % page_size if prefix else -1 for prefix in before]
    wanted, pages = [], iter(free)
    for prefix, end, slot in zip(before, after, last, strict=True):
        for position in range(prefix, end):
            slot = next(pages) * page_size if position % page_size == 0 else slot + 1
            wanted.append(slot)
    out = torch.full((len(wanted) + 2,), UNTOUCHED)
    # SGLang's tensors may be longer than the batch.
    given_lengths = [torch.tensor([*x, 999], dtype=dtype) for x in (before, after, last)]
    slots.alloc_extend_kernel((len(before),), *given_lengths, torch.tensor(free), out, 8, page_size)
    assert out.tolist() == [*wanted, UNTOUCHED, UNTOUCHED]


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), max_size=6), PAGE_SIZES, INTEGERS, st.randoms(use_true_random=False))
def test_the_next_token_gets_a_slot(lengths: list[int], page_size: int, dtype: torch.dtype, rng: random.Random) -> None:
    last = [rng.randrange(50) * page_size + (length - 2) % page_size for length in lengths]
    free = rng.sample(range(100, 400), 6)
    pages = iter(free)
    wanted = [next(pages) * page_size if (n - 1) % page_size == 0 else slot + 1 for n, slot in zip(lengths, last, strict=True)]
    out = torch.full((len(lengths) + 1,), UNTOUCHED)
    given_lengths = [torch.tensor([*x, 999], dtype=dtype) for x in (lengths, last)]
    slots.alloc_decode_kernel((len(lengths),), *given_lengths, torch.tensor(free), out, 8, page_size)
    assert out.tolist() == [*wanted, UNTOUCHED]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), max_size=5), INTEGERS, INTEGERS, st.randoms(use_true_random=False))
def test_the_last_slot_of_a_prefix(prefixes: list[int], dtype: torch.dtype, pool_dtype: torch.dtype, rng: random.Random) -> None:
    rows = rng.sample(range(7), len(prefixes))
    pool = table(rng, 7, 9)
    found = slots.get_last_loc_triton(pool, torch.tensor(rows, dtype=pool_dtype), torch.tensor(prefixes, dtype=dtype))
    assert found.dtype == dtype
    assert found.tolist() == [int(pool[row, prefix - 1]) if prefix else -1 for row, prefix in zip(rows, prefixes, strict=True)]


@settings(max_examples=30)
@given(LENGTHS, st.booleans(), INTEGERS)
def test_positions(lengths: list[tuple[int, int]], has_prefixes: bool, dtype: torch.dtype) -> None:
    wanted, starts = [], []
    for prefix, new in lengths:
        starts.append(len(wanted))
        for token in range(new):
            wanted.append(token + (prefix if has_prefixes else 0))
    prefixes = torch.tensor([prefix for prefix, _ in lengths] if has_prefixes else [], dtype=dtype)
    new_tokens = torch.tensor([new for _, new in lengths], dtype=dtype)
    positions, begin = slots.compute_position_triton(prefixes, new_tokens, len(wanted))
    assert (positions.tolist(), begin.tolist()) == (wanted, starts)
    assert (positions.dtype, begin.dtype) == (torch.int64, torch.int32)


@settings(max_examples=30)
@given(LENGTHS, INTEGERS, st.randoms(use_true_random=False))
def test_slots_are_written_into_the_table_of_requests(lengths: list[tuple[int, int]], dtype: torch.dtype, rng: random.Random) -> None:
    pool, rows = table(rng, 8, 50), rng.sample(range(8), len(lengths))
    given_slots = [rng.randrange(10_000) for _ in range(sum(new for _, new in lengths) + 3)]
    wanted, number = pool.clone(), 0
    for row, (start, new) in zip(rows, lengths, strict=True):
        for place in range(start, start + new):
            wanted[row, place] = given_slots[number]
            number += 1
    bounds = [torch.tensor(x, dtype=dtype) for x in ([start for start, _ in lengths], [sum(pair) for pair in lengths])]
    slots.assign_req_to_token_pool((len(rows),), torch.tensor(rows, dtype=dtype), pool, *bounds, torch.tensor(given_slots), 50, 8)
    assert torch.equal(pool, wanted)


@settings(max_examples=60)
@given(LENGTHS, st.booleans(), st.booleans(), st.sampled_from((1, 4)), INTEGERS, st.randoms(use_true_random=False))
def test_a_stream_of_slots(
    lengths: list[tuple[int, int]], starts_late: bool, is_mapped: bool, page_size: int, dtype: torch.dtype, rng: random.Random
) -> None:
    pool, rows = table(rng, 8, 48), rng.sample(range(8), len(lengths))
    pool[rng.randrange(8), rng.randrange(48)] = -1
    mapping = torch.tensor([rng.randrange(10_000) for _ in range(40_000)]) if is_mapped and page_size == 1 else None
    counts = [count for _, count in lengths]
    starts = [start if starts_late else 0 for start, _ in lengths]
    begin = [sum(counts[:number]) + 2 for number in range(len(counts) + 1)]
    wanted = [UNTOUCHED] * (sum(counts) + 4)
    for row, start, count, at in zip(rows, starts, counts, begin, strict=False):
        for token in range(start, start + count):
            slot = int(pool[row, token // page_size]) * page_size + token % page_size
            wanted[at + token - start] = slot if mapping is None or slot < 0 else int(mapping[slot])
    out = torch.full((len(wanted),), UNTOUCHED, dtype=torch.int32)
    tensors = [torch.tensor(x, dtype=dtype) for x in (rows, counts, begin)]
    start_at = torch.tensor(starts, dtype=dtype) if starts_late else None
    options = {"ENTRY_PAGE_SIZE": page_size, "token_mapping": mapping}
    slots.create_flashinfer_kv_indices_triton((len(rows), 3), pool, *tensors, start_at, out, 48, **options, num_warps=4)
    assert out.tolist() == wanted
    if starts_late and mapping is None and page_size == 1:
        again = torch.full_like(out, UNTOUCHED)
        slots.create_chunked_prefix_cache_kv_indices(
            (len(rows),), pool, tensors[0], torch.tensor(starts, dtype=dtype), tensors[1], tensors[2], again, 48
        )
        assert again.tolist() == wanted


def murmur(seed: int, position: int, column: int) -> int:
    """MurmurHash3_x86_32 of the sixteen bytes, with Python's own integers, as its author wrote it down."""
    state = 0
    data = (seed % 2**64).to_bytes(8, "little") + (position % 2**32).to_bytes(4, "little") + (column % 2**32).to_bytes(4, "little")
    for at in range(0, 16, 4):
        word = int.from_bytes(data[at : at + 4], "little") * 0xCC9E2D51 % 2**32
        word = (word << 15 | word >> 17) % 2**32 * 0x1B873593 % 2**32
        state ^= word
        state = ((state << 13 | state >> 19) % 2**32 * 5 + 0xE6546B64) % 2**32
    state ^= 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ state >> shift) * factor % 2**32
    return state ^ state >> 16


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1)), max_size=4), st.integers(0, 5), INTEGERS)
def test_the_hash_of_a_seed(rows: list[tuple[int, int]], width: int, dtype: torch.dtype) -> None:
    seeds = torch.tensor([seed for seed, _ in rows], dtype=torch.uint64)
    positions = torch.tensor([position for _, position in rows], dtype=dtype)
    found = logits.murmur_hash32(seeds, positions, torch.arange(width))
    assert found.dtype == torch.uint32
    assert found.tolist() == [[murmur(seed, position, column) for column in range(width)] for seed, position in rows]


def test_the_hash_of_a_signed_seed() -> None:
    assert logits.murmur_hash32(torch.tensor([-5, 42]), torch.tensor([7, 0]), torch.tensor([3])).tolist() == [
        [murmur(-5, 7, 3)],
        [murmur(42, 0, 3)],
    ]
