# SPDX-License-Identifier: Apache-2.0
"""What several backends check of a call before anything is written. Importing it imports PyTorch."""

import torch

from ..types import Refusal


def half_of(op: str, x: torch.Tensor) -> int:
    """Half of the last dimension. Raises ValueError if it is odd."""
    size = x.shape[-1] // 2
    if 2 * size != x.shape[-1]:
        raise ValueError(f"{op}: the last dimension holds two halves; it cannot be {x.shape[-1]}")
    return size


def check_hidden_size(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises Refusal if a norm's weight is of another size than what it is for."""
    if x.shape[-1] != weight.shape[-1]:
        raise Refusal(f"{op}: hidden_size is {weight.shape[-1]}, the last dimension of x {x.shape[-1]}")


def check_heads(op: str, heads: int, value_heads: int) -> None:
    """Raises Refusal unless each head of q and k serves as many heads of v."""
    if not heads or value_heads % heads:
        raise Refusal(f"{op}: {value_heads} heads of v are no multiple of {heads} heads of q and k")


def check_slots(op: str, slots: torch.Tensor, count: int) -> None:
    """Raises Refusal unless each sequence has a slot of the pool of states."""
    if len(slots) != count:
        raise Refusal(f"{op}: {len(slots)} slots for {count} sequences")


def check_chunk_kernel(op: str, q: torch.Tensor, v: torch.Tensor) -> None:
    """Raises Refusal for what flash-linear-attention's kernels of chunks do not take.

    They hold keys of up to 256 numbers, a matrix product takes 16 or more, and they multiply in 16 bits.
    """
    check_heads(op, q.shape[2], v.shape[2])
    key_dim, value_dim = q.shape[3], v.shape[3]
    if key_dim > 256 or min(key_dim, value_dim) < 16:
        raise Refusal(f"{op}: the kernel takes keys of 16 to 256 numbers, and they are {key_dim}, values {value_dim}")
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise Refusal(f"{op}: the kernel takes bf16 and fp16, and q is {q.dtype}")
