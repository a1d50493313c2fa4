# SPDX-License-Identifier: Apache-2.0
"""The update of gated-delta-rule states, in decode and while drafts are verified: against the recurrence as a matrix, in float64."""

import pytest
import torch
from accuracy import assert_within
from torch.nn.functional import logsigmoid

from sglang_fl.kernels.reference.delta_rule_update import fused_sigmoid_gating_delta_rule_update

HEADS, VALUE_HEADS, K, V, SLOTS = 2, 4, 5, 3, 4
#: fp32 roundings of one token: sums over K, the gates' exponents, the rest.
ROUNDINGS = K + 24


class Tokens:
    """Random tokens, and what they do to a state, in float64, beside the sizes of the terms."""

    def __init__(self, count: int, dtype: torch.dtype):
        self.q, self.k = (torch.randn(1, count, HEADS, K).to(dtype) for _ in "qk")
        self.v = torch.randn(1, count, VALUE_HEADS, V).to(dtype)
        self.a, self.b = (torch.randn(count, VALUE_HEADS).to(dtype) for _ in "ab")
        self.A_log, self.dt_bias = torch.randn(VALUE_HEADS), torch.randn(VALUE_HEADS)

    def step(self, token: int, head: int, state: torch.Tensor, terms: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The state [V, K] and o [V], each with its terms."""
        q, k = (x[0, token, head // (VALUE_HEADS // HEADS)].double() for x in (self.q, self.k))
        q, k = (x / (x.dot(x) + 1e-6).sqrt() for x in (q, k))
        v, beta = self.v[0, token, head].double(), self.b[token, head].double().sigmoid()
        decay = torch.exp(self.A_log[head].double().exp() * logsigmoid(-(self.a[token, head].double() + self.dt_bias[head].double())))
        grown = torch.eye(K).double() + beta * torch.outer(k.abs(), k.abs())
        state = decay * state @ (torch.eye(K).double() - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        # The decay's exponent is rounded before it is exponentiated: its size counts.
        size = 1 - decay.log()
        terms = size * decay * terms @ grown + beta * torch.outer(v.abs(), k.abs())
        return state, terms, state @ q * K**-0.5, terms @ q.abs() * K**-0.5

    def update(self, pool: torch.Tensor, slots: list[int], **more: object) -> torch.Tensor:
        arguments = (self.A_log, self.a, self.dt_bias, 1.0, 20.0, self.q, self.k, self.v, self.b, pool, torch.tensor(slots))
        return fused_sigmoid_gating_delta_rule_update(*arguments, use_qk_l2norm_in_kernel=True, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode(dtype: torch.dtype) -> None:
    """A token of each sequence, one of which is padding, and one sequence of none and one of two."""
    tokens, pool = Tokens(4, dtype), torch.randn(SLOTS, VALUE_HEADS, V, K)
    before, slots, ends = pool.clone(), [2, -1, 0, 3], [0, 1, 2, 2, 4]
    got = tokens.update(pool, slots, cu_seqlens=torch.tensor(ends))
    assert (got.shape, got.dtype) == (tokens.v.shape, dtype)
    for slot, start, end in zip(slots, ends, ends[1:], strict=False):
        for head in range(VALUE_HEADS):
            state = before[slot, head].double() if slot >= 0 else torch.zeros(V, K).double()
            terms = state.abs()
            for count, token in enumerate(range(start, end), 1):
                state, terms, o, o_terms = tokens.step(token, head, state, terms)
                assert_within("o", got[0, token, head], o, o_terms, ROUNDINGS * (count + 1))
            if slot >= 0:
                assert_within("state", pool[slot, head], state, terms, ROUNDINGS * (end - start + 1))
    assert torch.equal(pool[1], before[1]), "of no sequence"


def test_a_tree_of_drafts() -> None:
    """Each token continues from its parent; the pool is only read."""
    parents, rows, slots = [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3]], [1, 0], [3, 1]
    count = len(parents[0])
    tokens, pool = Tokens(2 * count, torch.float32), torch.randn(SLOTS, VALUE_HEADS, V, K)
    before, states = pool.clone(), torch.full((3, count, VALUE_HEADS, V, K), 7.0)
    got = tokens.update(
        pool,
        slots,
        cu_seqlens=torch.tensor([0, count, 2 * count]),
        disable_state_update=True,
        intermediate_states_buffer=states,
        intermediate_state_indices=torch.tensor(rows),
        cache_steps=count,
        retrieve_parent_token=torch.tensor(parents),
    )
    assert torch.equal(pool, before)
    assert (states[2] == 7).all(), "of no sequence"
    for sequence, (slot, row) in enumerate(zip(slots, rows, strict=True)):
        for head in range(VALUE_HEADS):
            first = before[slot, head].double()
            after: list[tuple[torch.Tensor, torch.Tensor]] = []
            for step, parent in enumerate(parents[sequence]):
                state, terms = after[parent] if step else (first, first.abs())
                token = sequence * count + step
                state, terms, o, o_terms = tokens.step(token, head, state, terms)
                after.append((state, terms))
                assert_within("o", got[0, token, head], o, o_terms, ROUNDINGS * (step + 2))
                assert_within("state", states[row, step, head], state, terms, ROUNDINGS * (step + 2))


def test_what_it_has_no_word_for_is_refused() -> None:
    tokens, pool = Tokens(1, torch.float32), torch.zeros(1, VALUE_HEADS, V, K)
    tokens.update(pool, [0], is_kda=False, lower_bound=None)
    with pytest.raises(NotImplementedError, match="in plain PyTorch has no is_kda"):
        tokens.update(pool, [0], is_kda=True)
