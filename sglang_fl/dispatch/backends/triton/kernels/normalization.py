# SPDX-License-Identifier: Apache-2.0
"""Norms in fp32: a row is read once and stays in registers, unless it is too long for them."""

import triton
import triton.language as tl

from .overlap import wait_for_the_last


@triton.jit
def _hidden(x, residual, at, residual_at, inside):
    """In fp32: x, and the residual added to it if there is one."""
    hidden = tl.load(x + at, inside, other=0.0).to(tl.float32)
    if residual is not None:
        hidden += tl.load(residual + residual_at, inside, other=0.0).to(tl.float32)
    return hidden


@triton.jit
def _scale(weight, column, inside, PLUS_ONE: tl.constexpr):
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    return 1 + scale if PLUS_ONE else scale


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x,
    residual,
    weight,
    out,
    x_stride,
    residual_stride,
    rows,
    eps,
    SIZE: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS rows in a program, into ``out``: contiguous, or with a residual x itself; the sum then goes into the residual."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    wait_for_the_last(OVERLAPS)
    at, residual_at, out_at = row * x_stride, row * residual_stride, row * SIZE
    if residual is not None:
        out_at = at
    if BLOCK >= SIZE:
        in_row = column < SIZE
        inside = in_row if ROWS == 1 else in_row & (row < rows)
        hidden = _hidden(x, residual, at + column, residual_at + column, inside)
        # What can be done before the sum, which waits for all of the row, is done before it.
        scale = _scale(weight, column, in_row, PLUS_ONE)
        if residual is not None:
            tl.store(residual + residual_at + column, hidden.to(residual.dtype.element_ty), inside)
        rstd = tl.rsqrt(tl.sum(hidden * hidden, 1, keep_dims=True) / SIZE + eps)
        tl.store(out + out_at + column, (hidden * rstd * scale).to(out.dtype.element_ty), inside)
    else:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, SIZE, BLOCK):
            here = start + column
            hidden = _hidden(x, residual, at + here, residual_at + here, here < SIZE)
            squares += hidden * hidden
        rstd = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / SIZE + eps)
        for start in range(0, SIZE, BLOCK):
            here = start + column
            inside = here < SIZE
            hidden = _hidden(x, residual, at + here, residual_at + here, inside)
            scale = _scale(weight, here, inside, PLUS_ONE)
            if residual is not None:
                tl.store(residual + residual_at + here, hidden.to(residual.dtype.element_ty), inside)
            tl.store(out + out_at + here, (hidden * rstd * scale).to(out.dtype.element_ty), inside)
