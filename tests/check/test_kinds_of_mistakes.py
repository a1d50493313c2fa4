# SPDX-License-Identifier: Apache-2.0
"""Every kind of mistake that users reported is caught; all kinds on all operators: ``make test-check-grid``."""

from collections.abc import Iterator

import pytest
import torch
from check.mistakes import KINDS, caught

TWICE = [kind for kind in KINDS if kind.startswith("wrong from row")]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "op"), [*((kind, ops[0]) for kind, (_, ops) in KINDS.items()), *((kind, KINDS[kind][1][1]) for kind in TWICE)]
)
def test_it_is_caught(kind: str, op: str) -> None:
    assert caught(kind, op) is not None
