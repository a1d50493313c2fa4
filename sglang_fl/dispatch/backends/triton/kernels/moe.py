# SPDX-License-Identifier: Apache-2.0
"""Experts. A route is a token's way to one of its experts: ``token * TOP_K + column``.

Routes are ordered by expert, each expert's filled up to whole blocks of rows of a matrix product. What is no expert of this rank, an id of
-1, is in no block: its row is neither computed nor summed up. Nothing is counted with atomics, and no memory has to be zeroed before.
"""

import triton
import triton.language as tl

from .activation import activated
from .overlap import wait_for_the_last


@triton.jit
def _experts_of(ids, route, routes, EXPERTS: tl.constexpr):
    """int32; EXPERTS where there is no route, or none to an expert of this rank."""
    expert = tl.load(ids + route, route < routes, other=-1).to(tl.int32)
    return tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS)


@triton.jit(do_not_specialize=["routes"])
def count_kernel(ids, counts, routes, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, OVERLAPS: tl.constexpr):
    """``counts[part]``: how many of a program's CHUNK routes go to each expert."""
    route = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    wait_for_the_last(OVERLAPS)
    number = tl.histogram(_experts_of(ids, route, routes, EXPERTS), BINS)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), number)


@triton.jit(do_not_specialize=["routes"])
def align_kernel(
    ids,
    counts,
    total,
    order,
    experts,
    routes,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A program an expert and CHUNK routes: its part of ``order``, which has each expert's routes and then ``routes`` up to whole blocks.

    The programs of the first chunk write ``experts`` too, a number for each block, and ``total``, the rows of all blocks. ``counts`` are of
    :func:`count_kernel`, or None where there is one chunk.
    """
    expert, part = tl.program_id(0), tl.program_id(1)
    bins, lane, within = tl.arange(0, BINS), tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    route = part * CHUNK + lane
    wait_for_the_last(OVERLAPS)
    expert_of = _experts_of(ids, route, routes, EXPERTS)
    before = 0
    if counts is None:
        number = tl.histogram(expert_of, BINS)
    else:
        number = tl.zeros([BINS], tl.int32)
        parts = tl.num_programs(1)
        for start in range(0, parts, PARTS):
            other = start + tl.arange(0, PARTS)[:, None]
            found = tl.load(counts + other * BINS + bins[None, :], other < parts, other=0)
            number += tl.sum(found, 0)
            before += tl.sum(tl.where((other < part) & (bins == expert)[None, :], found, 0))
    blocks = tl.where(bins < EXPERTS, (number + (BLOCK - 1)) // BLOCK, 0)
    first = tl.sum(tl.where(bins < expert, blocks, 0), 0)
    own = tl.sum(tl.where(bins == expert, number, 0), 0)
    order += first * BLOCK
    if part == 0:
        own_blocks = (own + (BLOCK - 1)) // BLOCK
        if expert == 0:
            tl.store(total, tl.sum(blocks, 0) * BLOCK)
        for start in range(0, own_blocks, BLOCK):
            block = start + within
            tl.store(experts + first + block, expert, block < own_blocks)
        tl.store(order + own + within, routes, own + within < own_blocks * BLOCK)
    if own > 0:
        hit = (expert_of == expert).to(tl.int32)
        tl.store(order + before + tl.cumsum(hit, 0) - 1, route, hit > 0)


@triton.jit(do_not_specialize=["routes", "blocks"])
def product_kernel(
    x,
    weight,
    bias,
    factors,
    out,
    total,
    order,
    experts,
    x_stride,
    expert_stride,
    weight_stride,
    bias_stride,
    routes,
    blocks,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """``out[route] = (x[route // TOP_K] @ weight[expert].T + bias[expert]) * factors[route]``, summed up in fp32.

    With an ACTIVATION, that is taken of it, still in fp32: where GATED of the first half of the columns, times the second. N and BLOCK_N
    count columns before it, and a program has BLOCK_N // 2 of each half, next to each other, so that a thread has a column and its factor.
    Without ``order`` each route is a block of its own, and ``experts`` are the routes' ids. Of up to GROUP blocks the same columns are next
    to each other, so that an expert's weights are read once.
    """
    OUT_N: tl.constexpr = N // 2 if GATED else N
    OUT_BLOCK: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    columns: tl.constexpr = (OUT_N + OUT_BLOCK - 1) // OUT_BLOCK
    group = tl.program_id(0) // (GROUP * columns)
    in_group = tl.program_id(0) % (GROUP * columns)
    height = tl.minimum(blocks - group * GROUP, GROUP)
    block = group * GROUP + in_group % height
    lane = tl.arange(0, BLOCK_M)
    wait_for_the_last(OVERLAPS)
    if order is None:
        expert = tl.load(experts + block).to(tl.int64)
        absent = (expert < 0) | (expert >= EXPERTS)
    else:
        expert = tl.zeros([], tl.int64)
        absent = block * BLOCK_M >= tl.load(total)
    if absent:
        return
    if order is None:
        route = tl.where(lane == 0, block, routes)
    else:
        expert = tl.load(experts + block).to(tl.int64)
        route = tl.load(order + block * BLOCK_M + lane)
    here = (route < routes)[:, None]
    first = in_group // height * OUT_BLOCK
    lane_n = tl.arange(0, BLOCK_N)
    column = (first + lane_n // 2) % OUT_N + (lane_n % 2) * OUT_N if GATED else (first + lane_n) % N
    depth = tl.arange(0, BLOCK_K)
    x_at = x + (route // TOP_K).to(tl.int64)[:, None] * x_stride + depth[None, :]
    weight_at = weight + expert * expert_stride + column.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            left = tl.load(x_at, here, other=0.0)
            right = tl.load(weight_at)
        else:
            left = tl.load(x_at, here & (start + depth < K)[None, :], other=0.0)
            right = tl.load(weight_at, (start + depth < K)[:, None], other=0.0)
        result = tl.dot(left, right, result)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if bias is not None:
        result += tl.load(bias + expert * bias_stride + column).to(tl.float32)[None, :]
    if factors is not None:
        result *= tl.load(factors + route, route < routes, other=0.0)[:, None]
    if GATED:
        gate, up = tl.split(tl.reshape(result, [BLOCK_M, OUT_BLOCK, 2]))
        result = activated(gate, ACTIVATION) * up
    elif ACTIVATION is not None:
        result = activated(result, ACTIVATION)
    out_column = first + tl.arange(0, OUT_BLOCK)
    out_at = out + route.to(tl.int64)[:, None] * OUT_N + out_column[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), here & (out_column < OUT_N)[None, :])


@triton.jit
def sum_kernel(
    x,
    ids,
    out,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """``out[token]``: the sum of its routes' rows of x, in fp32; a program a token and BLOCK columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    wait_for_the_last(OVERLAPS)
    result = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        route = token * TOP_K + i
        expert = tl.load(ids + route)
        here = (expert >= 0) & (expert < EXPERTS)
        result += tl.load(x + route * SIZE + column, inside & here, other=0.0).to(tl.float32)
    tl.store(out + token * SIZE + column, result.to(out.dtype.element_ty), inside)
