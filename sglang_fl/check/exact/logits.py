# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
import torch

from .judge import TINY, Exact, Same, exactly

Words = np.ndarray[Any, np.dtype[np.uint64]]

_MASK = np.uint64(0xFFFFFFFF)


def softcap(full_logits: torch.Tensor, final_logit_softcapping: float) -> tuple[Exact, ...]:
    argument = exactly(full_logits) / final_logit_softcapping
    value = final_logit_softcapping * torch.tanh(argument)
    lost = torch.where(argument.abs() < TINY, value.abs(), 0.0)
    # One rounding of tanh's argument becomes less than one rounding of its result.
    return (Exact("logits", value, value.abs(), 10, lost),)


def murmur_hash(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> tuple[Same, ...]:
    """MurmurHash3_x86_32 of 16 bytes: seed (8), position (4), column (4). uint32 ``[tokens, columns]``. uint64 holds each product."""

    def word(x: torch.Tensor) -> Words:
        return x.cpu().numpy().astype(np.uint64)

    def rotated(x: Words, count: int) -> Words:
        return (x << np.uint64(count) | x >> np.uint64(32 - count)) & _MASK

    rows, state = word(seed)[:, None], np.zeros((len(seed), len(col_indices)), dtype=np.uint64)
    for part in (rows & _MASK, rows >> np.uint64(32), word(positions)[:, None] & _MASK, word(col_indices) & _MASK):
        mixed = rotated(part * np.uint64(0xCC9E2D51) & _MASK, 15) * np.uint64(0x1B873593) & _MASK
        state = (rotated(state ^ mixed, 13) * np.uint64(5) + np.uint64(0xE6546B64)) & _MASK
    state ^= np.uint64(16)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ state >> np.uint64(shift)) * np.uint64(factor) & _MASK
    return (Same("hash", torch.from_numpy((state ^ state >> np.uint64(16)).astype(np.uint32))),)
