# SPDX-License-Identifier: Apache-2.0
"""Runs an implementation of topk or fused_moe on every case that ``sglang-fl check`` has for them."""

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sglang_fl.check.cases.call import Draw, Make, rows_of
from sglang_fl.check.cases.moe import OPERATORS

REFUSALS = (ValueError, TypeError, NotImplementedError)


def calls(op: str) -> Iterator[tuple[str, Make]]:
    operator = OPERATORS[op]
    for words in rows_of(f"{operator.forms} | {operator.unusual} | {operator.special}"):
        yield words, operator.form.of(words)


def check(op: str, fn: Callable[..., Any], make: Make, dtype: torch.dtype, device: str = "cpu", seed: int | None = None) -> None:
    """Asserts that a call's result is right and that it wrote nothing; refusals are passed on."""
    seed = secrets.randbits(31) if seed is None else seed
    call = make(Draw(torch.Generator().manual_seed(seed), dtype, torch.device(device)))
    kept = {name: x.clone() for name, x in call.tensors().items()}
    (wanted,) = OPERATORS[op].exact(call)
    arguments, named = call.arguments()
    problem = wanted.judge(fn(*arguments, **named), dtype, torch.device(device)).problem
    assert problem is None, f"seed {seed}: {problem}"
    for name, x in call.tensors().items():
        assert torch.equal(x.nan_to_num(7), kept[name].nan_to_num(7)), f"{op} wrote {name}"


def refused(op: str, fn: Callable[..., Any], dtype: torch.dtype, device: str = "cpu") -> dict[str, str]:
    """The cases that an implementation does not take, with what it says; it is right in all others."""
    found = {}
    for name, make in calls(op):
        try:
            check(op, fn, make, dtype, device)
        except REFUSALS as refusal:
            found[name] = str(refusal)
    return found
