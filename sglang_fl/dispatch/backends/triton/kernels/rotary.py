# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings: query and key in one launch, in place where that is allowed."""

import triton
import triton.language as tl

from .overlap import wait_for_the_last


@triton.jit
def _row_of(positions, axis_at, token, inside, table_stride):
    """Where the row begins that a token's position names."""
    return (tl.load(positions + axis_at + token, inside, other=0).to(tl.int64) * table_stride)[:, None]


@triton.jit
def _by_axis(
    table, time_at, height_at, width_at, pair, inside, TIME: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, MIXED: tl.constexpr
):
    """Each pair's number from the row of its section."""
    if MIXED:
        of_height = (pair % 3 == 1) & (pair < 3 * HEIGHT)
        of_width = (pair % 3 == 2) & (pair < 3 * WIDTH)
        # Neighbours are of different sections: several numbers at once can be read of all three rows only.
        in_time, in_height, in_width = inside, inside, inside
    else:
        of_height = (pair >= TIME) & (pair < TIME + HEIGHT)
        of_width = pair >= TIME + HEIGHT
        in_time, in_height, in_width = inside & (pair < TIME), inside & of_height, inside & of_width
    time = tl.load(table + time_at + pair, in_time, other=0.0)
    height = tl.load(table + height_at + pair, in_height, other=0.0)
    width = tl.load(table + width_at + pair, in_width, other=0.0)
    return tl.where(of_height, height, tl.where(of_width, width, time)).to(tl.float32)


@triton.jit
def _turn(
    x,
    out,
    cos,
    sin,
    positions,
    token_stride,
    head_stride,
    table_stride,
    positions_stride,
    first_row,
    tokens,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    MIXED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """ROWS heads of x ``[tokens, HEADS, HEAD_DIM]`` from a row on, each head of each token being a row."""
    row = first_row + tl.arange(0, ROWS)
    is_row = row < tokens * HEADS
    token, in_rows = (row // HEADS).to(tl.int64), is_row[:, None]
    x += (token * token_stride + row % HEADS * head_stride)[:, None]
    if out is None:
        out = x
    else:
        out += row.to(tl.int64)[:, None] * HEAD_DIM
        if REST:
            number = 2 * HALF + tl.arange(0, REST)[None, :]
            not_turned = in_rows & (number < HEAD_DIM)
            tl.store(out + number, tl.load(x + number, not_turned), not_turned)
    pair, number = tl.arange(0, BLOCK)[None, :], tl.arange(0, 2 * BLOCK)[None, :]
    inside, both_inside = in_rows & (pair < HALF), in_rows & (number < 2 * HALF)
    # The numbers are on their way while the position is read: without the barrier behind them the compiler asks for the position first,
    # and for the numbers when it is there.
    if INTERLEAVED:
        first, second = tl.split(tl.load(x + number, both_inside, other=0.0).reshape(ROWS, BLOCK, 2))
    else:
        first, second = tl.load(x + pair, inside, other=0.0), tl.load(x + (pair + HALF), inside, other=0.0)
    tl.debug_barrier()
    at = _row_of(positions, 0, token, is_row, table_stride)
    if TIME is None:
        c = tl.load(cos + at + pair, inside, other=0.0).to(tl.float32)
        s = tl.load(sin + at + pair, inside, other=0.0).to(tl.float32)
    else:
        height_at = _row_of(positions, positions_stride, token, is_row, table_stride)
        width_at = _row_of(positions, 2 * positions_stride, token, is_row, table_stride)
        c = _by_axis(cos, at, height_at, width_at, pair, inside, TIME, HEIGHT, WIDTH, MIXED)
        s = _by_axis(sin, at, height_at, width_at, pair, inside, TIME, HEIGHT, WIDTH, MIXED)
    first, second = first.to(tl.float32), second.to(tl.float32)
    turned, turned_second = (first * c - second * s).to(x.dtype.element_ty), (second * c + first * s).to(x.dtype.element_ty)
    if INTERLEAVED:
        tl.store(out + number, tl.join(turned, turned_second).reshape(ROWS, 2 * BLOCK), both_inside)
    else:
        tl.store(out + pair, turned, inside)
        tl.store(out + (pair + HALF), turned_second, inside)


@triton.jit(do_not_specialize=["tokens"])
def rotary_kernel(
    query,
    key,
    cos,
    sin,
    positions,
    query_out,
    key_out,
    query_token,
    query_head,
    key_token,
    key_head,
    table_stride,
    positions_stride,
    tokens,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    MIXED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS heads of query in each of the first programs, ROWS heads of key in each of the others.

    Without ``query_out`` and ``key_out``, which are contiguous, it writes to query and key. TIME is None where positions have one row,
    REST the next power of two from how many numbers of a head are not turned.
    """
    program, of_query = tl.program_id(0), tl.cdiv(tokens * QUERY_HEADS, ROWS)
    wait_for_the_last(OVERLAPS)
    if program < of_query:
        _turn(
            query,
            query_out,
            cos,
            sin,
            positions,
            query_token,
            query_head,
            table_stride,
            positions_stride,
            program * ROWS,
            tokens,
            QUERY_HEADS,
            HEAD_DIM,
            HALF,
            INTERLEAVED,
            TIME,
            HEIGHT,
            WIDTH,
            MIXED,
            ROWS,
            BLOCK,
            REST,
        )
    else:
        _turn(
            key,
            key_out,
            cos,
            sin,
            positions,
            key_token,
            key_head,
            table_stride,
            positions_stride,
            (program - of_query) * ROWS,
            tokens,
            KEY_HEADS,
            HEAD_DIM,
            HALF,
            INTERLEAVED,
            TIME,
            HEIGHT,
            WIDTH,
            MIXED,
            ROWS,
            BLOCK,
            REST,
        )
