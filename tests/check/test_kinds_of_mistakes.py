# SPDX-License-Identifier: Apache-2.0
"""Every kind of mistake that users reported is caught; all kinds on all operators: ``make test-check-grid``."""

from typing import Any

import pytest
import torch
from backend_functions import reference
from check.mistakes import KINDS, caught

from sglang_fl.check import accuracy
from sglang_fl.check.cases import OPERATORS_CHECKED, cases_of
from sglang_fl.check.check_case import check_case
from sglang_fl.check.constants import FAILED, OK, SIZES
from sglang_fl.check.implementation import Implementation

TWICE = [kind for kind in KINDS if kind.startswith("wrong from row")]


@pytest.mark.parametrize(
    ("kind", "op"), [*((kind, ops[0]) for kind, (_, ops) in KINDS.items()), *((kind, KINDS[kind][1][1]) for kind in TWICE)]
)
def test_it_is_caught(kind: str, op: str) -> None:
    assert caught(kind, op) is not None


@pytest.mark.parametrize("op", ["silu_and_mul", "rotary_embedding", "mrotary_embedding", "topk", "fused_moe"])
def test_of_a_large_call_some_tokens_are_judged(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right passes; what is wrong in half of the tokens, and in no other, does not."""
    monkeypatch.setattr(accuracy, "_JUDGED_WHOLE", 1 << 9)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = getattr(reference, op)(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        first[len(first) // 2 :] += 1
        return result

    cpu = torch.device("cpu")
    cases = [case for case in cases_of(op, None, cpu, quick=True) if case.check == SIZES][:12]
    large = [case for case in cases if accuracy._some_tokens(case.draw(1, cpu), OPERATORS_CHECKED[op].tokens_in) is not None]
    assert large
    for case in large[:3]:
        assert check_case(Implementation(op, getattr(reference, op), None, cpu), case, 1).status == OK
        assert check_case(Implementation(op, wrong, None, cpu), case, 1).status == FAILED
