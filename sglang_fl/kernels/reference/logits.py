# SPDX-License-Identifier: Apache-2.0
"""Functions on logits: Gemma's soft cap, and the hash of seeded sampling."""

import torch

_MASK = 0xFFFFFFFF


def softcap_inplace_logits(full_logits: torch.Tensor, final_logit_softcapping: float) -> torch.Tensor:
    """``cap * tanh(logits / cap)``, in place."""
    capped = torch.tanh(full_logits.float() / final_logit_softcapping) * final_logit_softcapping
    return full_logits.copy_(capped)


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (32 bits, seed 0) of a row's 64-bit seed and 32-bit position and a column's 32-bit index: [rows, columns]."""
    seed = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.long()
    positions, columns = positions.long() & _MASK, col_indices.long() & _MASK
    state = torch.zeros_like(positions)
    for word in (seed & _MASK, (seed >> 32) & _MASK, positions):
        state = _mix(state, word)
    return _finish(_mix(state.unsqueeze(1), columns) ^ 16).to(torch.uint32)


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """The product modulo 2**32, without overflow of int64."""
    return ((x * (factor & 0xFFFF)) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & _MASK


def _rotated(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    word = _times(_rotated(_times(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_rotated(state ^ word, 13) * 5 + 0xE6546B64) & _MASK


def _finish(state: torch.Tensor) -> torch.Tensor:
    state = _times(state ^ (state >> 16), 0x85EBCA6B)
    state = _times(state ^ (state >> 13), 0xC2B2AE35)
    return state ^ (state >> 16)
