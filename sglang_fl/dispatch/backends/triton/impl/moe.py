# SPDX-License-Identifier: Apache-2.0
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from ...moe import Experts, fused_moe_by
from ..kernels.moe import align_kernel, count_kernel, product_kernel, sum_kernel
from .activation import tile
from .launch import launch

#: A batch with fewer routes than a quarter of the experts is not ordered: few of its tokens share an expert.
_SPARSE = 4
#: How many routes a program looks at at once, at least and at most. With more, another kernel counts them first.
_LEAST_CHUNK, _CHUNK = 256, 4096
#: Of how many chunks a program reads the counts at once, and how many counts at most.
_PARTS, _NUMBERS = 16, 4096
#: How many blocks of rows are next to each other in the order in which programs start.
_GROUP = 16
#: Rows of a block -> its columns, how many numbers of each are multiplied at once, warps, and stages.
_TILES = {16: (64, 128, 4, 3), 32: (128, 128, 4, 2), 64: (128, 64, 4, 3), 128: (256, 64, 8, 4)}
_LEAST_COLUMNS, _LEAST_DEPTH = 32, 16


class _Blocks(NamedTuple):
    """Routes in blocks of rows: see :func:`..kernels.moe.align_kernel`."""

    total: torch.Tensor | None
    order: torch.Tensor | None
    experts: torch.Tensor
    number: int


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _shared_memory() -> int:
    """Bytes that a program may have of it on this chip."""
    if triton.knobs.runtime.interpret:
        return 1 << 20
    driver = triton.runtime.driver.active
    found: int = driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"]
    return found


def _height(routes: int, experts: int) -> int:
    """Rows of a block: twice what an expert has in the mean, so that most have one block."""
    return min(max(_TILES), max(min(_TILES), triton.next_power_of_2(2 * triton.cdiv(routes, experts))))


@lru_cache
def product_tile(height: int, size: int, depth: int) -> tuple[int, int, int, int]:
    """(columns, depth, warps, stages) of a product with ``size`` columns, of rows of ``depth`` numbers in 16 bits."""
    block, block_k, warps, stages = _TILES[height]
    while block > _LEAST_COLUMNS and -size % block * 8 > size:
        block //= 2
    while block_k > _LEAST_DEPTH and (block_k > depth or (depth % block_k and block_k > 64)):
        block_k //= 2
    while stages > 2 and stages * 2 * (height + block) * block_k > _shared_memory():
        stages -= 1
    while block > _LEAST_COLUMNS and stages * 2 * (height + block) * block_k > _shared_memory():
        block //= 2
    return block, block_k, warps, stages


def _aligned(ids: torch.Tensor, experts: int, height: int) -> _Blocks:
    routes = ids.numel()
    if routes * _SPARSE <= experts:
        return _Blocks(None, None, ids, routes)
    # Each expert with a route has less than a block to spare.
    count = (routes + min(experts, routes) * (height - 1)) // height
    # One tensor, its parts 64 bytes apart at any number of routes: Triton compiles other programs for other alignments.
    total, order, numbers = ids.new_empty(16 + count * (height + 1), dtype=torch.int32).split((16, count * height, count))
    chunk = min(_CHUNK, max(_LEAST_CHUNK, triton.next_power_of_2(routes)))
    bins, parts = triton.next_power_of_2(experts + 1), triton.cdiv(routes, chunk)
    warps, counts = 4 if chunk <= 1024 else 8, None
    if parts > 1:
        counts = ids.new_empty((parts, bins), dtype=torch.int32)
        launch(count_kernel, (parts,), ids, counts, routes, experts, bins, chunk, warps=warps)
    at_once = max(1, min(_PARTS, _NUMBERS // bins))
    launch(align_kernel, (experts, parts), ids, counts, total, order, numbers, routes, experts, bins, height, chunk, at_once, warps=warps)
    return _Blocks(total, order, numbers, count)


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: torch.Tensor | None,
    blocks: _Blocks,
    routes: int,
    height: int,
    activation: str | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """``[routes, size]``, or half as many columns if gated; rows of x are tokens, or routes."""
    experts, size, depth = weight.shape
    out = x.new_empty((routes, size // 2 if gated else size))
    if bias is not None and bias.stride(1) != 1:
        bias = bias.contiguous()
    columns, block_k, warps, stages = product_tile(height, size, depth)
    launch(
        product_kernel,
        (blocks.number * triton.cdiv(size, columns),),
        x,
        weight,
        bias,
        factors,
        out,
        blocks.total,
        blocks.order,
        blocks.experts,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        0 if bias is None else bias.stride(0),
        routes,
        blocks.number,
        experts,
        routes // len(x),
        size,
        depth,
        height,
        columns,
        block_k,
        _GROUP,
        activation,
        gated,
        warps=warps,
        num_stages=stages,
    )
    return out


def compute(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    experts: Experts,
) -> torch.Tensor:
    experts.check(x, w13, w2, topk_weights, topk_ids, w13_bias)
    if w13.stride(-1) != 1 or w2.stride(-1) != 1:
        raise ValueError("fused_moe: the kernel needs the last dimension of the experts' weights contiguous")
    if not topk_ids.numel():
        return torch.zeros_like(x)
    if x.stride(1) != 1:
        x = x.contiguous()
    ids, factors = topk_ids.contiguous(), topk_weights.contiguous()
    count, hidden = w13.shape[0], x.shape[1]
    (tokens, top_k), routes = ids.shape, ids.numel()
    height = _height(routes, count)
    blocks = _aligned(ids, count, height)
    first, last = (factors, None) if experts.weight_on_input else (None, factors)
    inner = _product(x, w13, w13_bias, first, blocks, routes, height, experts.activation, experts.is_gated)
    routed = _product(inner, w2, w2_bias, last, blocks, routes, height)
    out = x.new_empty((tokens, hidden))
    _, block, warps = tile(hidden)
    launch(sum_kernel, (tokens, triton.cdiv(hidden, block)), routed, ids, out, count, top_k, hidden, block, warps=warps)
    return out


fused_moe = fused_moe_by(compute)
