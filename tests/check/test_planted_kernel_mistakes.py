# SPDX-License-Identifier: Apache-2.0
"""Mistakes planted into the references of SGLang's kernels. ``sglang-fl check --quick`` finds each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backend_functions import reference_of
from check.mistakes import CHECKS, INT32, Function, first_failure

from sglang_fl.check.constants import THREADS
from sglang_fl.kernels.reference import REFERENCES

Right = Callable[..., Any]


def index_one_too_far(right: Right) -> Function:
    def fn(grid: Any, table: Any, rows: Any, *more: Any, **named: Any) -> Any:
        return right(grid, table, (rows + 1) % len(table), *more, **named)

    return fn


def read_one_too_early(right: Right) -> Function:
    def fn(grid: Any, table: Any, *more: Any, **named: Any) -> Any:
        return right(grid, table.roll(1, 1), *more, **named)

    return fn


def one_not_written(out: int, at: int = -1) -> Callable[[Right], Function]:
    def plant(right: Right) -> Function:
        def fn(*args: Any, **named: Any) -> None:
            kept = args[out][at:].clone()
            right(*args, **named)
            args[out][at:] = kept

        return fn

    return plant


def neighbour_overwritten(out: int) -> Callable[[Right], Function]:
    """One number past the end is written, as by a kernel that writes whole blocks."""

    def plant(right: Right) -> Function:
        def fn(*args: Any, **named: Any) -> None:
            right(*args, **named)
            x = args[out]
            x.as_strided((1,), (1,), x.storage_offset() + x.numel()).zero_()

        return fn

    return plant


def wrong_without_requests(right: Right) -> Function:
    def fn(grid: Any, *args: Any, **named: Any) -> Any:
        if grid and not grid[0]:
            raise IndexError("no program")
        return right(grid, *args, **named)

    return fn


def offset_in_32_bits(right: Right) -> Function:
    def fn(grid: Any, table: Any, rows: Any, *more: Any, **named: Any) -> Any:
        within = table.stride(0) * rows.long() < INT32
        return right(grid, table, torch.where(within, rows, 0), *more, **named)

    return fn


def page_in_32_bits(right: Right) -> Function:
    def fn(*args: Any, **named: Any) -> None:
        right(*args, **named)
        args[-3].copy_(args[-3].int())

    return fn


def changed(**to: Any) -> Callable[[Right], Function]:
    """Some named arguments are replaced."""

    def plant(right: Right) -> Function:
        def fn(grid: Any, *args: Any, **named: Any) -> Any:
            return right(grid, *args, **{name: to.get(name, value) if value is not None else None for name, value in named.items()})

        return fn

    return plant


def ten_times_epsilon(right: Right) -> Function:
    """Of the numbers that are given, epsilon is the only float."""

    def fn(*args: Any) -> Any:
        return right(*(10 * arg if isinstance(arg, float) else arg for arg in args))

    return fn


def heads_taken_for_others(right: Right) -> Function:
    """Value heads of the same key head do not lie side by side."""

    def fn(*args: Any) -> Any:
        qkv, z, b, a = right(*args)
        return qkv, z.flip(1), b, a

    return fn


def half_of_the_seed(right: Right) -> Function:
    return lambda grid, seed, *more: right(grid, seed.long() & 0xFFFFFFFF, *more)


def wrong_from_row(first: int) -> Callable[[Right], Function]:
    def plant(right: Right) -> Function:
        def fn(*args: Any, **named: Any) -> Any:
            got = right(*args, **named)
            (got[0] if isinstance(got, tuple) else got)[first:] += 1
            return got

        return fn

    return plant


def one_buffer_for_all(right: Right) -> Function:
    """The result is in memory that the next call overwrites."""
    kept: dict[Any, torch.Tensor] = {}

    def fn(*args: Any, **named: Any) -> Any:
        got = right(*args, **named)
        return kept.setdefault((got.shape, got.dtype), got).copy_(got)

    return fn


def rounded_on_the_way(right: Right) -> Function:
    """Numbers are rounded to bf16."""

    def fn(*args: Any, **named: Any) -> Any:
        return tuple(x.bfloat16().to(x.dtype) for x in right(*args, **named))

    return fn


MISTAKES: list[tuple[str, Callable[[Right], Function]]] = [
    ("create_flashinfer_kv_indices_triton", index_one_too_far),
    ("create_flashinfer_kv_indices_triton", read_one_too_early),
    ("create_chunked_prefix_cache_kv_indices", read_one_too_early),
    ("get_last_loc_triton", index_one_too_far),
    ("alloc_decode_kernel", one_not_written(4)),
    ("alloc_extend_kernel", one_not_written(5)),
    ("create_flashinfer_kv_indices_triton", one_not_written(6, at=-3)),
    ("alloc_extend_kernel", neighbour_overwritten(5)),
    ("create_flashinfer_kv_indices_triton", neighbour_overwritten(6)),
    ("alloc_decode_kernel", wrong_without_requests),
    ("assign_req_to_token_pool", wrong_without_requests),
    ("create_flashinfer_kv_indices_triton", offset_in_32_bits),
    ("get_last_loc_triton_safe", offset_in_32_bits),
    ("alloc_extend_kernel", page_in_32_bits),
    ("layernorm_gated:rms_norm_gated", changed(group_size=None)),
    ("layernorm_gated:rms_norm_gated", changed(eps=1e-5)),
    ("fused_norm_gate:rms_norm_gated", changed(eps=1e-5)),
    ("fused_qkvzba_split_reshape_cat", heads_taken_for_others),
    ("murmur_hash32", half_of_the_seed),
    ("fused_sigmoid_mul", wrong_from_row(65535)),
    ("fused_qk_gemma_rmsnorm", wrong_from_row(65535)),
    ("fused_gdn_gating", rounded_on_the_way),
    ("fused_qk_gemma_rmsnorm_with_gate", rounded_on_the_way),
    ("fused_qk_gemma_rmsnorm", ten_times_epsilon),
    ("fused_gate_sigmoid_mul", one_buffer_for_all),
]


@pytest.mark.parametrize(("name", "plant"), MISTAKES)
def test_it_is_caught(name: str, plant: Callable[[Right], Function]) -> None:
    (target,) = (target for target in REFERENCES if target.endswith(name if ":" in name else f":{name}"))
    assert first_failure(target, plant(reference_of(target)), CHECKS - {THREADS}) is not None
