# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in float64, with bounds for the error of a correct implementation.

A row ``s`` of a head's state (the K numbers for one number of v) is updated by each token:
``s <- (I - beta k k') exp(g) s + beta v k``. Its error is propagated by the same factor, and ``I - beta k k'`` has norm
``max(1, |1 - beta |k|^2|)``. Each token adds its own rounding errors. Those of different tokens are independent: their
squares are added, and the sum stays within ``CONFIDENCE`` times the root, except with probability
``2 exp(-CONFIDENCE ** 2 / 2)`` (Higham and Mary 2019, A New Approach to Probabilistic Rounding Error Analysis).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from .judge import TINY, U32, Exact, Same, exactly, smallest, summation, u

CONFIDENCE = 6.0
#: Roundings of a token's arithmetic, except for its sums.
_REST = 8
#: How often a token's contribution to its chunk is rounded to the activations' dtype (q, k, v, the state, the solved
#: triangle and its factor). This models such kernels; it is not a proof.
_IN_CHUNK = 8
_CHUNK = 64


@dataclass
class _Rows:
    """States ``[N, HV, V, K]`` of sequences, the squared error of each row, and the sizes of the terms summed in its chunk."""

    state: torch.Tensor
    squares: torch.Tensor
    terms: torch.Tensor

    @classmethod
    def of(cls, state: torch.Tensor) -> "_Rows":
        """States without an error."""
        return cls(state, torch.zeros(state.shape[:-1], dtype=torch.float64), state.norm(dim=-1))

    @property
    def error(self) -> torch.Tensor:
        return (CONFIDENCE * self.squares.sqrt() + TINY).nan_to_num()

    def at(self, index: slice | torch.Tensor) -> "_Rows":
        return _Rows(self.state[index], self.squares[index], self.terms[index])


@dataclass
class _Tokens:
    """Tokens in float64: ``q``, ``k`` ``[N, HV, K]``, ``v`` ``[N, HV, V]``, ``g``, ``beta`` ``[N, HV]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor

    def at(self, index: torch.Tensor) -> "_Tokens":
        return _Tokens(self.q[index], self.k[index], self.v[index], self.g[index], self.beta[index])

    def step(self, rows: _Rows, unit: float, b: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Update each state by a token. Returns their ``o`` ``[N, HV, V]`` and the bounds of its error.

        Args:
            unit: the error of one rounding.
            b: what beta is the sigmoid of, if that is computed too. Beta may be rounded to its dtype.
        """
        decay, beta = self.g.exp().unsqueeze(-1), self.beta.unsqueeze(-1)
        size_k, size_q = self.k.norm(dim=-1, keepdim=True), self.q.norm(dim=-1, keepdim=True)
        roundings = summation(self.k.shape[-1]) + _REST
        rows.state = rows.state * decay.unsqueeze(-1)
        before = rows.state.norm(dim=-1)
        wrong_by = self.v - (rows.state * self.k.unsqueeze(-2)).sum(-1)
        rows.state = rows.state + (beta * wrong_by).unsqueeze(-1) * self.k.unsqueeze(-2)
        # exp turns one rounding of g into |g| roundings of its result; a strong decay makes it small again.
        by_beta = (self.v.abs() + before * size_k) * size_k
        brought = beta * by_beta
        rows.terms = torch.maximum(rows.terms * decay, before) + brought
        added = unit * rows.terms + U32 * roundings * (brought + before) + U32 * self.g.abs().unsqueeze(-1) * before
        if b is not None:
            # One fp32 rounding of b becomes at most |b| of its sigmoid. Small ones are below the dtype's normal numbers.
            unit_beta = u(b.dtype) + U32 * float(b.abs().max()) if b.numel() else 0.0
            added = added + unit_beta * brought + smallest(b.dtype) / 2 * by_beta
        growth = decay * torch.maximum(torch.ones_like(beta), (1 - beta * size_k.square()).abs())
        rows.squares = growth.square() * rows.squares + added.square()
        o = (rows.state * self.q.unsqueeze(-2)).sum(-1)
        size = torch.maximum(rows.state.norm(dim=-1), unit / max(unit, U32) * rows.terms)
        return o, size_q * (CONFIDENCE * rows.squares.sqrt() + TINY + (unit + U32 * roundings) * size)


def _tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, scale: float | None, normed: bool
) -> _Tokens:
    """All tokens in order, with heads repeated, in float64."""
    q, k = exactly(q), exactly(k)
    if normed:
        q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    q, k = (x.repeat_interleave(v.shape[-2] // x.shape[-2], -2) for x in (q, k))
    q, k, v, g, beta = (x.flatten(0, -3) for x in (q, k, exactly(v), exactly(g).unsqueeze(-1), exactly(beta).unsqueeze(-1)))
    return _Tokens(q, k, v, g.squeeze(-1), beta.squeeze(-1))


def _spans(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """``[N, 2]``: the first token and the number of tokens of each sequence."""
    ends = range(0, q.shape[0] * q.shape[1] + 1, max(1, q.shape[1])) if cu_seqlens is None else cu_seqlens.tolist()
    return torch.tensor([(start, end - start) for start, end in pairwise(ends)], dtype=torch.int64).view(-1, 2)


@dataclass
class _Result:
    """``o`` of each token with its bounds, each sequence's last state, and the states before chunks."""

    out: torch.Tensor
    error: torch.Tensor
    last: _Rows
    chunks: _Rows


def _run(tokens: _Tokens, spans: torch.Tensor, states: torch.Tensor, unit: float, b: torch.Tensor | None = None) -> _Result:
    """Run all sequences at once, longest first, so that those with tokens left are always the first ones."""
    starts, lengths = spans.unbind(-1)
    of_chunks = (lengths + _CHUNK - 1) // _CHUNK
    first_chunk = of_chunks.cumsum(0) - of_chunks
    order = lengths.argsort(descending=True)
    rows = _Rows.of(states[order])
    before = rows.at(torch.zeros(int(of_chunks.sum()), dtype=torch.int64)) if len(states) else rows
    out, error = torch.zeros_like(tokens.v), torch.zeros_like(tokens.v)
    for token in range(int(lengths.max()) if len(lengths) else 0):
        running = order[: int((lengths > token).sum())]
        now = rows.at(slice(0, len(running)))
        if token % _CHUNK == 0:
            now.terms = now.state.norm(dim=-1)
            chunk = first_chunk[running] + token // _CHUNK
            before.state[chunk], before.squares[chunk] = now.state, now.squares
        at = starts[running] + token
        out[at], error[at] = tokens.at(at).step(now, unit, b)
        n = len(running)
        rows.state[:n], rows.squares[:n], rows.terms[:n] = now.state, now.squares, now.terms
    return _Result(out, error.nan_to_num(), rows.at(order.argsort()), before)


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
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
) -> tuple[Exact, ...]:
    """``o``, the states before chunks, and the pool if it is updated."""
    spans = _spans(q, cu_seqlens)
    pool = q.new_zeros((1, v.shape[2], v.shape[3], k.shape[3])) if initial_state is None else initial_state
    slots = torch.arange(len(spans)) if initial_state_indices is None else initial_state_indices.cpu().long()
    states = _begin(pool, slots if initial_state is not None else torch.zeros_like(slots))
    unit = _IN_CHUNK * u(q.dtype) if q.dtype != torch.float32 else 0.0
    found = _run(_tokens(q, k, v, g, beta, scale, use_qk_l2norm_in_kernel), spans, states, unit)
    results = [
        _output("o", found.out, found.error, v.shape),
        _states("the states before chunks", found.chunks.state.unflatten(0, (q.shape[0], -1)), found.chunks.error, roundings=1),
    ]
    if initial_state is not None and inplace_update:
        results.append(_pool_after(initial_state, slots, found.last))
    return tuple(results)


def _begin(pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The states of sequences before their first token. Those without a slot begin at zero."""
    states = exactly(pool)[slots.clamp(min=0)]
    states[slots < 0] = 0
    return states


def _output(name: str, out: torch.Tensor, error: torch.Tensor, shape: torch.Size) -> Exact:
    return Exact(name, out.view(shape), out.view(shape).abs(), 1, error.view(shape))


def _states(name: str, value: torch.Tensor, error: torch.Tensor, roundings: float, dtype: torch.dtype | None = None) -> Exact:
    return Exact(name, value, value.abs(), roundings, error.reshape(value.shape[:-1]).unsqueeze(-1).expand(value.shape), dtype=dtype)


def _pool_after(pool: torch.Tensor, slots: torch.Tensor, last: _Rows) -> Exact:
    value = exactly(pool)
    error = torch.zeros(value.shape[:-1], dtype=torch.float64)
    value[slots[slots >= 0]], error[slots[slots >= 0]] = last.state[slots >= 0], last.error[slots >= 0]
    return _states("the pool of states", value, error, roundings=0, dtype=pool.dtype)


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
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Exact, ...]:
    """``o``, and the last states if they are wanted."""
    spans = _spans(q, cu_seqlens)
    states = q.new_zeros((len(spans), v.shape[2], v.shape[3], k.shape[3])) if initial_state is None else initial_state
    tokens = _tokens(q, k, v, g, torch.ones_like(g) if beta is None else beta, scale, use_qk_l2norm_in_kernel)
    found = _run(tokens, spans, exactly(states), 0.0)
    out = _output("o", found.out, found.error, v.shape)
    if not output_final_state:
        return (out,)
    return out, _states("the last states", found.last.state, found.last.error, roundings=1, dtype=torch.float32)


def _gates(a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = exactly(a) + exactly(dt_bias)
    return -exactly(A_log).exp() * torch.logaddexp(x, torch.zeros_like(x)), exactly(b).sigmoid()


def fused_gdn_gating(A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor) -> tuple[Exact, ...]:
    """The logarithm of the decay, and beta: fp32, ``[1, tokens, heads]``. Beta may be rounded to b's dtype."""
    g, beta = _gates(a, b, A_log, dt_bias)
    scale = exactly(A_log).exp()
    # softplus adds 1 to a possibly far smaller number. One rounding of exp's argument becomes |argument| roundings of its result.
    terms = g.abs() * (1 + exactly(A_log).abs()) + scale * (1 + exactly(a).abs() + exactly(dt_bias).abs())
    decay = Exact("the decay", g.unsqueeze(0), terms.unsqueeze(0), 8, dtype=torch.float32)
    lost = beta * (u(b.dtype) + 8 * U32 * (1 + exactly(b).abs())) + smallest(b.dtype) + 2.0**-127
    return decay, Exact("beta", beta.unsqueeze(0), beta.unsqueeze(0), 1, lost.unsqueeze(0), dtype=torch.float32)


def fused_sigmoid_gating_delta_rule_update(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
) -> tuple[Exact | Same, ...]:
    """``o``, and the updated pool. With drafts: ``o``, the unchanged pool, and the buffer with the state after each drafted token."""
    tokens = _tokens(q, k, v, *_gates(a, b, A_log, dt_bias), None, True)
    pool, slots = initial_state_source, initial_state_indices.cpu().long()
    first = _begin(pool, slots)
    if intermediate_states_buffer is None or intermediate_state_indices is None:
        found = _run(tokens, _spans(q, cu_seqlens), first, 0.0, b)
        return _output("o", found.out, found.error, v.shape), _pool_after(pool, slots, found.last)
    out, error = torch.zeros_like(tokens.v), torch.zeros_like(tokens.v)
    begin = _Rows.of(first)
    after: list[_Rows] = []
    value, steps = exactly(intermediate_states_buffer), intermediate_states_buffer.shape[1]
    wrong = torch.zeros(value.shape[:-1], dtype=torch.float64)
    sequences, rows = torch.arange(len(slots)), intermediate_state_indices.cpu().long()
    for step in range(steps):
        before = [step - 1] * len(slots) if retrieve_parent_token is None else retrieve_parent_token[:, step].tolist()
        chosen = [begin.at(slice(n, n + 1)) if step == 0 else after[before[n]].at(slice(n, n + 1)) for n in range(len(slots))]
        now = _Rows(*(torch.cat([getattr(one, part) for one in chosen]) for part in ("state", "squares", "terms"))) if chosen else begin
        at = sequences * steps + step
        out[at], error[at] = tokens.at(at).step(now, 0.0, b)
        value[rows, step], wrong[rows, step] = now.state, now.error
        after.append(now)
    written = _states("the states after drafts", value, wrong, roundings=0, dtype=intermediate_states_buffer.dtype)
    return _output("o", out, error.nan_to_num(), v.shape), Same("the pool of states", pool.cpu().clone()), written


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
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Exact, ...]:
    """``out`` and the pool."""
    value_heads, value_dim, key_dim = initial_state.shape[1:]
    width = (mixed_qkv.shape[1] - value_heads * value_dim) // 2
    q, k, v = (
        part.unflatten(1, (-1, dim))
        for part, dim in zip(mixed_qkv.split([width, width, value_heads * value_dim], 1), (key_dim, key_dim, value_dim), strict=True)
    )
    tokens = _tokens(q, k, v, *_gates(a, b, A_log, dt_bias), scale, use_qk_l2norm_in_kernel)
    slots = ssm_state_indices.cpu().long()
    real = (slots >= 0).nonzero()
    spans = torch.cat((real, torch.ones_like(real)), -1)
    found = _run(tokens, spans, exactly(initial_state)[slots[real[:, 0]]], 0.0, b)
    return _output("out", found.out, found.error, out.shape), _pool_after(initial_state, slots[real[:, 0]], found.last)
