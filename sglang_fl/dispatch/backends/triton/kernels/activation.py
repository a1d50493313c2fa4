# SPDX-License-Identifier: Apache-2.0
"""Activations, and a kernel of gated ones: each number of the input is read once; between, all is in fp32."""

import triton
import triton.language as tl

from .overlap import wait_for_the_last


@triton.jit
def _times_sigmoid(v, exponent):
    """``v / (1 + 2 ** exponent)``. The square of a reciprocal root takes fewer instructions than a division."""
    root = tl.rsqrt(1 + tl.exp2(exponent))
    return v * (root * root)


@triton.jit
def activated(v, NAME: tl.constexpr):
    """NAME is "silu", "gelu", "gelu_tanh" or "relu2"; v is fp32."""
    if NAME == "silu":
        result = _times_sigmoid(v, -1.4426950408889634 * v)  # -log2(e)
    elif NAME == "gelu":
        result = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    elif NAME == "relu2":
        result = tl.where(v < 0, 0.0, v * v)
    else:
        # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 * u)), which needs no tanh and cancels nowhere; -2 * sqrt(2 / pi) * log2(e) is the first.
        result = _times_sigmoid(v, v * (-2.302208198144325 - 0.1029432395800235 * (v * v)))
    return result


@triton.jit(do_not_specialize=["rows"])
def activation_kernel(
    x,
    out,
    x_stride,
    rows,
    NAME: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """``out[row] = activation(x[row, :SIZE]) * x[row, SIZE:]``; ROWS rows and BLOCK columns in a program."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = column < SIZE
    if ROWS > 1:
        inside = inside & (row < rows)
    at = x + row * x_stride + column
    wait_for_the_last(OVERLAPS)
    result = activated(tl.load(at, inside).to(tl.float32), NAME) * tl.load(at + SIZE, inside).to(tl.float32)
    tl.store(out + row * SIZE + column, result.to(out.dtype.element_ty), inside)
