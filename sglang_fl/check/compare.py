# SPDX-License-Identifier: Apache-2.0
"""Compares the results of one call with the exact ones. It lies beside ``repeat.py`` in an archive, and needs only PyTorch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def compare(results: list[Any], arguments: list[Any], named: dict[str, Any]) -> int:
    """Print what is wrong with results, and with the arguments that were given for them. Returns 1 if anything is, else 0."""
    here = Path(__file__).parent
    expected, may_write = torch.load(here / "exact.pt")
    results = _tensors(results)
    wrong = len(results) != len(expected) and bool(expected)
    if wrong:
        print(f"it has {len(results)} results, not {len(expected)}")
    for (name, exact, bound, dtype), result in zip(expected, results, strict=False):
        if (result.dtype, result.shape) != (dtype, exact.shape):
            print(f"{name}: {result.dtype} of shape {tuple(result.shape)}, not {dtype} of shape {tuple(exact.shape)}")
            wrong = True
            continue
        off = (result.detach().cpu().double() - exact).abs().nan_to_num(nan=float("inf")).flatten()
        count = int((off > bound).sum())
        print(f"{name}: {count} of {len(off)} are out of bounds; the largest error is {max([0.0, *off.tolist()]):.4g}")
        wrong |= count > 0
    then = torch.load(here / "inputs.pt", map_location="cpu")
    for place, (before, now) in enumerate(zip([*then[0], *then[1].values()], [*arguments, *named.values()], strict=True)):
        if place not in may_write and not all(map(_same, _tensors(before), _tensors(now))):
            print(f"argument {place} was written, which is read-only")
            wrong = True
    if not wrong:
        print("Right in this one call. If it was wrong in the model, it needs the calls before, as with state kept between calls.")
    return int(wrong)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, SimpleNamespace):
        value = list(vars(value).values())
    if isinstance(value, (list, tuple)):
        return [x for one in value for x in _tensors(one)]
    return [value] if isinstance(value, torch.Tensor) else []


def _same(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Bit by bit: nan equals nan."""
    now = now.detach().cpu()
    return (before.dtype, before.shape) == (now.dtype, now.shape) and torch.equal(_bytes(before), _bytes(now))


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8)
