# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in float64, and beside it how large the error of a right implementation may be.

A row ``s`` of a head's state (the K numbers of one number of v) goes from token to token as
``s <- (I - beta k k') exp(g) s + beta v k``. What it is wrong by goes the same way, and ``I - beta k k'`` has norm
``max(1, |1 - beta |k|^2|)``; each token adds what its own roundings cost. Those of different tokens are independent:
their squares are added, and the sum is within ``CONFIDENCE`` times its root but for a chance of
``2 exp(-CONFIDENCE ** 2 / 2)`` (Higham and Mary 2019, A New Approach to Probabilistic Rounding Error Analysis).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from .judge import TINY, U32, Exact, exactly, u

CONFIDENCE = 6.0
#: Roundings of a sum of n numbers, beside log2(n); and of the rest of a token's arithmetic.
_SUM, _REST = 8, 8
#: How often a number that a token brings to its chunk is rounded to the activations' dtype on its way (q, k, v, the state,
#: the solved triangle and what is multiplied with it); a model of such kernels and no proof.
_IN_CHUNK = 8
_CHUNK = 64


@dataclass
class _Rows:
    """A sequence's state ``[HV, V, K]``, and for each row the square of its error ``[HV, V]``."""

    state: torch.Tensor
    squares: torch.Tensor
    #: The sizes of the terms that were summed since the chunk began.
    terms: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def error(self) -> torch.Tensor:
        return CONFIDENCE * self.squares.sqrt() + TINY


@dataclass
class _Token:
    """A token's numbers in float64: ``q``, ``k`` ``[HV, K]``, ``v`` ``[HV, V]``, ``g``, ``beta`` ``[HV]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor

    def step(self, rows: _Rows, unit: float, unit_beta: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the state on by this token; its ``o`` ``[HV, V]``, and how far an implementation's may be from it.

        Args:
            unit: what one rounding costs.
            unit_beta: what beta may be wrong by, besides.
        """
        decay, beta = self.g.exp().unsqueeze(-1), self.beta.unsqueeze(-1)
        size_k, size_q = self.k.norm(dim=-1, keepdim=True), self.q.norm(dim=-1, keepdim=True)
        roundings = math.log2(max(2, self.k.shape[-1])) + _SUM + _REST
        rows.state = rows.state * decay.unsqueeze(-1)
        before = rows.state.norm(dim=-1)
        wrong_by = self.v - (rows.state * self.k.unsqueeze(-2)).sum(-1)
        rows.state = rows.state + (beta * wrong_by).unsqueeze(-1) * self.k.unsqueeze(-2)
        # exp turns one rounding of g into |g| of its result, which a decay that is small makes up for.
        brought = beta * (self.v.abs() + before * size_k) * size_k
        rows.terms = torch.maximum(rows.terms * decay, before) + brought
        added = unit * rows.terms + U32 * roundings * (brought + before) + U32 * self.g.abs().unsqueeze(-1) * before + unit_beta * brought
        growth = decay * torch.maximum(torch.ones_like(beta), (1 - beta * size_k.square()).abs())
        rows.squares = growth.square() * rows.squares + added.square()
        o = (rows.state * self.q.unsqueeze(-2)).sum(-1)
        size = torch.maximum(rows.state.norm(dim=-1), unit / max(unit, U32) * rows.terms)
        return o, size_q * (rows.error + (unit + U32 * roundings) * size)


def _tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, scale: float, use_qk_l2norm: bool
) -> _Token:
    """All tokens, heads repeated, in float64."""
    q, k = exactly(q), exactly(k)
    if use_qk_l2norm:
        q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[-2] // x.shape[-2], -2) for x in (q * scale, k))
    return _Token(q, k, exactly(v), exactly(g), exactly(beta))


def _sequences(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[tuple[int, slice]]:
    if cu_seqlens is None:
        return [(row, slice(0, q.shape[1])) for row in range(q.shape[0])]
    ends = cu_seqlens.tolist()
    return [(0, slice(start, end)) for start, end in pairwise(ends)]


@dataclass
class _Result:
    """What a run gives: values and errors of ``o``, of each sequence's last state, and of the states before chunks."""

    out: torch.Tensor
    error: torch.Tensor
    last: list[_Rows]
    chunks: list[tuple[torch.Tensor, torch.Tensor]]


def _run(all_tokens: _Token, sequences: list[tuple[int, slice]], states: Iterable[torch.Tensor], unit: float) -> _Result:
    found = _Result(torch.zeros_like(all_tokens.v), torch.zeros_like(all_tokens.v), [], [])
    for state, (row, span) in zip(states, sequences, strict=True):
        rows = _Rows(state, torch.zeros(state.shape[:-1], dtype=torch.float64))
        for token in range(span.start, span.stop):
            if (token - span.start) % _CHUNK == 0:
                found.chunks.append((rows.state, rows.error))
                rows.terms = rows.state.norm(dim=-1)
            at = row, token
            one = _Token(*(x[at] for x in (all_tokens.q, all_tokens.k, all_tokens.v, all_tokens.g, all_tokens.beta)))
            found.out[at], found.error[at] = one.step(rows, unit)
        found.last.append(rows)
    return found


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
    inplace_update: bool = True,
) -> tuple[Exact, ...]:
    """``o``, the states before chunks, and the pool if it is updated."""
    sequences = _sequences(q, cu_seqlens)
    pool = None if initial_state is None else exactly(initial_state)
    slots = list(range(len(sequences))) if initial_state_indices is None else initial_state_indices.tolist()
    zero = torch.zeros((v.shape[2], v.shape[3], k.shape[3]), dtype=torch.float64)
    states = [zero if pool is None or slot < 0 else pool[slot] for slot in slots]
    tokens = _tokens(q, k, v, g, beta, k.shape[-1] ** -0.5 if scale is None else scale, use_qk_l2norm)
    unit = _IN_CHUNK * u(q.dtype) if q.dtype != torch.float32 else 0.0
    found = _run(tokens, sequences, states, unit)
    values = torch.stack([value for value, _ in found.chunks]) if found.chunks else zero.new_zeros((0, *zero.shape))
    errors = torch.stack([error for _, error in found.chunks]) if found.chunks else zero.new_zeros((0, *zero.shape[:-1]))
    values, errors = values.view(q.shape[0], -1, *zero.shape), errors.view(q.shape[0], -1, *zero.shape[:-1])
    results = [
        Exact("o", found.out, found.out.abs(), 1, found.error.nan_to_num()),
        Exact("the states before chunks", values, values.abs(), 1, errors.unsqueeze(-1).nan_to_num().expand_as(values)),
    ]
    if pool is not None and initial_state is not None and inplace_update:
        results.append(_pool_after(pool, slots, found.last, initial_state.dtype))
    return tuple(results)


def _pool_after(pool: torch.Tensor, slots: list[int], last: list[_Rows], dtype: torch.dtype) -> Exact:
    pool, errors = pool.clone(), torch.zeros_like(pool)
    for slot, rows in zip(slots, last, strict=True):
        if slot >= 0:
            pool[slot], errors[slot] = rows.state, rows.error.unsqueeze(-1)
    return Exact("the pool of states", pool, pool.abs(), 0, errors.nan_to_num(), dtype=dtype)


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Exact, ...]:
    """``o``, and the last states if they are wanted."""
    sequences = _sequences(q, cu_seqlens)
    zero = torch.zeros((len(sequences), v.shape[2], v.shape[3], k.shape[3]), dtype=torch.float64)
    states = zero if initial_state is None else exactly(initial_state)
    tokens = _tokens(
        q, k, v, g, torch.ones_like(g) if beta is None else beta, k.shape[-1] ** -0.5 if scale is None else scale, use_qk_l2norm
    )
    found = _run(tokens, sequences, states, 0.0)
    out = Exact("o", found.out, found.out.abs(), 1, found.error.nan_to_num())
    if not output_final_state:
        return (out,)
    last = torch.stack([rows.state for rows in found.last]) if sequences else zero
    errors = torch.stack([rows.error for rows in found.last]).unsqueeze(-1) if sequences else zero
    return out, Exact("the last states", last, last.abs(), 1, errors.nan_to_num().expand_as(last), dtype=torch.float32)


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm: bool = False,
) -> tuple[Exact, ...]:
    """``out`` and the pool."""
    value_heads, value_dim, key_dim = initial_state.shape[1:]
    width = (mixed_qkv.shape[1] - value_heads * value_dim) // 2
    q, k, v = (
        part.unflatten(1, (-1, dim))
        for part, dim in zip(mixed_qkv.split([width, width, value_heads * value_dim], 1), (key_dim, key_dim, value_dim), strict=True)
    )
    x = exactly(a) + exactly(dt_bias)
    g = -exactly(A_log).exp() * torch.logaddexp(x, torch.zeros_like(x))
    tokens = _tokens(q, k, v, g, exactly(b).sigmoid(), scale, use_qk_l2norm)
    pool, slots = exactly(initial_state), ssm_state_indices.tolist()
    # b in fp32, rounded to its dtype or not; a rounding of b turns into |b| of its sigmoid at most.
    unit_beta = u(b.dtype) + U32 * float(b.abs().max()) if b.numel() else 0.0
    last = []
    value, error = torch.zeros(out.shape, dtype=torch.float64), torch.zeros(out.shape, dtype=torch.float64)
    for row, slot in enumerate(slots):
        state = pool[slot] if slot >= 0 else torch.zeros_like(pool[0])
        rows = _Rows(state, torch.zeros(state.shape[:-1], dtype=torch.float64))
        if slot >= 0:
            one = _Token(tokens.q[row], tokens.k[row], tokens.v[row], tokens.g[row], tokens.beta[row])
            value[row, 0], error[row, 0] = one.step(rows, 0.0, unit_beta)
        last.append(rows)
    return (
        Exact("out", value, value.abs(), 1, error.nan_to_num()),
        _pool_after(pool, slots, last, initial_state.dtype),
    )
