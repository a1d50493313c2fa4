# SPDX-License-Identifier: Apache-2.0
"""A token of the gated delta rule: each state is read once and written once; between, all is in fp32."""

import triton
import triton.language as tl

from .overlap import wait_for_the_last


@triton.jit
def _softplus(x):
    """``log(1 + exp(x))``. Where that is nearly 1 the sum has lost most of its exponential, and the quotient puts it back."""
    small = tl.exp(-tl.abs(x))
    total = 1 + small
    more = tl.where(total == 1, small, tl.log(total) * (small / tl.where(total == 1, 1.0, total - 1)))
    return tl.maximum(x, 0.0) + more


@triton.jit
def _reciprocal_norm(x):
    return tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit(do_not_specialize=["a_stride", "b_stride", "slots_stride"])
def packed_decode_kernel(
    mixed,
    a,
    b,
    A_log,
    dt_bias,
    pool,
    out,
    slots,
    scale,
    mixed_stride,
    a_stride,
    b_stride,
    pool_stride,
    slots_stride,
    HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    NORMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """ROWS rows, of BLOCK numbers or fewer, of one head's state ``[VALUE_DIM, KEY_DIM]`` of one sequence in a program.

    The programs of a sequence follow each other as its state lies in memory. With ``S`` the decayed state and ``u = beta * (v - S k)``
    the new state is ``S + u k'``, and ``out = S q + u (k q)``: both sums over the state can be taken as soon as it is there.
    """
    PARTS: tl.constexpr = (VALUE_DIM + ROWS - 1) // ROWS
    program = tl.program_id(0)
    head = program // PARTS % VALUE_HEADS
    sequence = (program // (PARTS * VALUE_HEADS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    row = program % PARTS * ROWS + tl.arange(0, ROWS)
    in_key, in_value = column < KEY_DIM, row < VALUE_DIM
    key_head = head // (VALUE_HEADS // HEADS)
    wait_for_the_last(OVERLAPS)
    slot = tl.load(slots + sequence * slots_stride).to(tl.int64)
    # What does not depend on the slot is on its way while the slot is read, and is worked on while the state is read.
    q_at = mixed + sequence * mixed_stride + key_head * KEY_DIM + column
    v_at = mixed + sequence * mixed_stride + 2 * HEADS * KEY_DIM + head * VALUE_DIM + row
    q = tl.load(q_at, in_key, other=0.0).to(tl.float32)
    k = tl.load(q_at + HEADS * KEY_DIM, in_key, other=0.0).to(tl.float32)
    v = tl.load(v_at, in_value, other=0.0).to(tl.float32)
    of_a, of_b = tl.load(a + sequence * a_stride + head), tl.load(b + sequence * b_stride + head)
    of_A_log, of_bias = tl.load(A_log + head), tl.load(dt_bias + head)
    used = slot >= 0
    inside = in_value[:, None] & in_key[None, :] & used
    state_at = pool + slot * pool_stride + head * (VALUE_DIM * KEY_DIM) + row[:, None] * KEY_DIM + column[None, :]
    state = tl.load(state_at, inside, other=0.0).to(tl.float32)
    if NORMED:
        q *= _reciprocal_norm(q)
        k *= _reciprocal_norm(k)
    q *= scale
    beta = tl.sigmoid(of_b.to(tl.float32))
    state *= tl.exp(-tl.exp(of_A_log.to(tl.float32)) * _softplus(of_a.to(tl.float32) + of_bias.to(tl.float32)))
    update = beta * (v - tl.sum(state * k[None, :], 1))
    result = tl.sum(state * q[None, :], 1) + update * tl.sum(k * q, 0)
    tl.store(state_at, (state + update[:, None] * k[None, :]).to(pool.dtype.element_ty), inside)
    out_at = out + (sequence * VALUE_HEADS + head) * VALUE_DIM + row
    tl.store(out_at, tl.where(used, result, 0.0).to(out.dtype.element_ty), in_value)
