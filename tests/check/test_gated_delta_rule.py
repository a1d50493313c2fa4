# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the gated delta rule and the convolution before it that the checks find."""

import secrets
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backend_functions import reference

from sglang_fl.check.cases import cases_of
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import FAILED, OK, SERVING, SPECIAL, UNUSUAL
from sglang_fl.check.implementation import Implementation
from sglang_fl.dispatch.backends.reference.impl import gated_delta_rule as arithmetic

CPU = torch.device("cpu")
DTYPES = frozenset({torch.bfloat16, torch.float32})
CHUNK, RECURRENT, PACKED = (
    "chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_packed_decode",
)
STATES, CONVOLUTION, NEXT_CONVOLUTION = "fused_sigmoid_gating_delta_rule_update", "causal_conv1d_fn", "causal_conv1d_update"
#: Arguments of SGLang's functions by place.
Q, K, V, G, BETA, SCALE, STATE, SLOTS, NORM, UPDATE = 0, 1, 2, 3, 4, 5, 6, 7, 9, 10


def with_argument(op: str, place: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    def fn(*args: Any) -> Any:
        changed = change(args[place])
        return getattr(reference, op)(*args[:place], changed, *args[place + 1 :])

    return fn


def states_in_bf16(*args: Any) -> Any:
    pool = args[STATE].bfloat16()
    result = reference.chunk_gated_delta_rule(*args[:STATE], pool, *args[STATE + 1 :])
    args[STATE].copy_(pool)
    return result


def states_transposed(*args: Any) -> Any:
    pool = args[STATE].transpose(-1, -2).contiguous()
    result = reference.chunk_gated_delta_rule(*args[:STATE], pool, *args[STATE + 1 :])
    if args[UPDATE]:
        args[STATE].copy_(pool.transpose(-1, -2))
    return result


def states_after_chunks(*args: Any) -> Any:
    out, chunks = reference.chunk_gated_delta_rule(*args)
    return out, chunks.roll(1, 1)


def padding_is_the_last_slot(*args: Any) -> Any:
    slots = args[SLOTS]
    return reference.chunk_gated_delta_rule(*args[:SLOTS], slots % len(args[STATE]) if slots is not None else None, *args[SLOTS + 1 :])


def heads_taken_in_turn(*args: Any) -> Any:
    """Head ``i`` of v with head ``i % H`` of q."""
    q, k, v = args[:3]
    q, k = (x.repeat(1, 1, v.shape[2] // x.shape[2], 1) for x in (q, k))
    return reference.fused_recurrent_gated_delta_rule(q, k, *args[2:])


def no_sigmoid(*args: Any) -> Any:
    return reference.fused_recurrent_gated_delta_rule_packed_decode(*args[:2], torch.logit(args[2].float().clamp(0, 1)), *args[3:])


def padding_left_as_it_was(*args: Any) -> Any:
    out, slots = args[7], args[8]
    before = out.clone()
    result = reference.fused_recurrent_gated_delta_rule_packed_decode(*args)
    out[slots < 0] = before[slots < 0]
    return result


def next_slot_touched(*args: Any) -> Any:
    result = reference.fused_recurrent_gated_delta_rule_packed_decode(*args)
    pool, slots = args[6], args[8]
    free = next((slot for slot in range(len(pool)) if slot not in slots.tolist()), None)
    if free is not None:
        pool[free] *= 1.001
    return result


def state_a_token_late(*args: Any) -> Any:
    pool = args[3]
    result = reference.causal_conv1d_fn(*args)
    if pool is not None:
        pool.copy_(pool.roll(1, -1))
    return result


def padding_in_the_last_slot(*args: Any) -> Any:
    slots = args[5]
    return reference.causal_conv1d_update(*args[:5], None if slots is None else slots % len(args[1]), *args[6:])


def with_part(op: str, name: str, part: Any) -> Callable[..., Any]:
    """The reference with another function or module in the place of one that it is made of."""

    def fn(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arithmetic, name, part)
            return getattr(reference, op)(*args)

    return fn


def normed_by(epsilon: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + epsilon)


#: ``softplus`` that is its argument from 5 on, and one that overflows.
EARLY, OVERFLOWING = (
    SimpleNamespace(softplus=lambda x: torch.where(x <= 5, x.exp().log1p(), x)),
    SimpleNamespace(softplus=lambda x: x.exp().log1p()),
)

MISTAKES: list[tuple[str, Callable[..., Any], str, str]] = [
    (CHUNK, with_argument(CHUNK, G, torch.zeros_like), SERVING, "out of bounds"),
    (CHUNK, with_argument(CHUNK, BETA, lambda beta: beta.half()), SERVING, "out of bounds"),
    (CHUNK, with_argument(CHUNK, NORM, lambda norm: False), SERVING, "out of bounds"),
    (CHUNK, with_argument(CHUNK, SCALE, lambda scale: scale or 1.0), SERVING, "out of bounds"),
    (CHUNK, with_argument(CHUNK, UPDATE, lambda update: True), SERVING, "wrote initial_state, which is read-only"),
    (CHUNK, with_argument(CHUNK, SLOTS, lambda slots: slots.flip(0)), SERVING, "out of bounds"),
    (CHUNK, states_in_bf16, SERVING, "the pool of states (torch.float32)"),
    (CHUNK, states_transposed, SERVING, "out of bounds"),
    (CHUNK, states_after_chunks, SERVING, "the states before chunks"),
    (CHUNK, padding_is_the_last_slot, UNUSUAL, "out of bounds"),
    (CHUNK, lambda *args: reference.chunk_gated_delta_rule(*args)[0], SERVING, "results, not"),
    (RECURRENT, heads_taken_in_turn, SERVING, "out of bounds"),
    (RECURRENT, with_argument(RECURRENT, BETA, lambda beta: None), SERVING, "out of bounds"),
    *((op, with_part(op, "_normed", normed_by(1e-5)), UNUSUAL, "out of bounds") for op in (CHUNK, RECURRENT, PACKED)),
    (PACKED, with_part(PACKED, "functional", EARLY), SPECIAL, "out of bounds"),
    (PACKED, with_part(PACKED, "functional", OVERFLOWING), SPECIAL, "out of bounds"),
    (PACKED, no_sigmoid, SERVING, "out of bounds"),
    (PACKED, padding_left_as_it_was, SERVING, "out of bounds"),
    (PACKED, next_slot_touched, SERVING, "the pool of states"),
    (PACKED, with_argument(PACKED, 4, lambda bias: bias + 1e-3), SERVING, "out of bounds"),
    (STATES, with_argument(STATES, 8, lambda b: torch.logit(b.float().clamp(0.01, 0.99))), SERVING, "out of bounds"),
    (STATES, with_argument(STATES, 10, lambda slots: slots.flip(0)), SERVING, "out of bounds"),
    (STATES, with_argument(STATES, 14, lambda only_read: False), UNUSUAL, "the pool of states"),
    (STATES, with_argument(STATES, 16, lambda rows: rows.flip(0)), UNUSUAL, "the states after drafts"),
    (STATES, with_argument(STATES, 18, lambda parents: None), UNUSUAL, "out of bounds"),
    (CONVOLUTION, with_argument(CONVOLUTION, 1, lambda weight: weight.flip(1)), SERVING, "y (torch.bfloat16)"),
    (CONVOLUTION, with_argument(CONVOLUTION, 2, lambda bias: None), SERVING, "y (torch.bfloat16)"),
    (CONVOLUTION, with_argument(CONVOLUTION, 7, lambda goes_on: None), SERVING, "y (torch.bfloat16)"),
    (CONVOLUTION, with_argument(CONVOLUTION, 8, lambda activation: None), SERVING, "y (torch.bfloat16)"),
    (CONVOLUTION, state_a_token_late, SERVING, "the pool of states"),
    (NEXT_CONVOLUTION, padding_in_the_last_slot, UNUSUAL, "the pool of states"),
    (NEXT_CONVOLUTION, with_argument(NEXT_CONVOLUTION, 8, lambda children: None), UNUSUAL, "out of bounds"),
]


def test_beta_may_be_rounded_to_the_dtype_of_its_argument() -> None:
    """As in SGLang's kernel of decode; in fp16 small ones are zero then."""
    rounded = with_argument(PACKED, 2, lambda b: torch.logit(b.float().sigmoid().to(b.dtype).float()))
    impl = Implementation(PACKED, rounded, None, CPU)
    for case in cases_of(PACKED, frozenset({torch.float16}), CPU, quick=True):
        if case.check == SPECIAL:
            outcome = check_case(impl, case, 7)
            assert outcome.status == OK, (case.name, outcome.message)


@pytest.mark.parametrize(("op", "mistake", "check", "expected"), MISTAKES)
def test_a_mistake_is_caught(op: str, mistake: Callable[..., Any], check: str, expected: str) -> None:
    seed = secrets.randbits(31)
    print(f"seed {seed}")
    impl = Implementation(op, mistake, None, CPU)
    outcomes = (check_case(impl, case, seed) for case in cases_of(op, DTYPES, CPU, quick=True) if case.check == check)
    messages = []
    for outcome in outcomes:
        messages.append(outcome.message)
        if outcome.status == FAILED and expected in outcome.message:
            return
    pytest.fail(f"{expected} is in none of {messages}")
