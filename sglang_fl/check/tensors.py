# SPDX-License-Identifier: Apache-2.0
"""The tensors of a call: comparing them bit by bit, filling and restoring them."""

from collections.abc import Callable

import torch

from .cases import Call


def bits(x: torch.Tensor) -> torch.Tensor:
    """The numbers' bits: nan equals nan, and 0 differs from -0."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def changed(call: Call, kept: dict[str, torch.Tensor], allowed: frozenset[str]) -> list[str]:
    """The names of a call's tensors that differ from ``kept``, except for the allowed ones."""
    return [name for name, x in call.tensors().items() if name not in allowed and not same_bits(x, kept[name])]


def refill(call: Call, fresh: Call) -> None:
    """Copy another call's numbers into the tensors of this one."""
    for name, x in call.tensors().items():
        x.copy_(fresh.tensors()[name])


def restorer(call: Call) -> Callable[[], None]:
    """Returns a function that restores the inputs that may be written."""
    kept = {name: call.inputs[name].clone() for name in call.may_write}

    def restore() -> None:
        for name, x in kept.items():
            call.inputs[name].copy_(x)

    return restore
