# SPDX-License-Identifier: Apache-2.0
"""Checks of a call that several backends share; made before anything is written. Imports PyTorch."""

import torch

from ..types import Refusal

#: The largest offset of a kernel that counts in int32.
MOST_OFFSET = 2**31 - 1


def half_of(op: str, x: torch.Tensor) -> int:
    """Half of the last dimension. Raises ValueError if it is odd."""
    size = x.shape[-1] // 2
    if 2 * size != x.shape[-1]:
        raise ValueError(f"{op}: the last dimension must be even, found {x.shape[-1]}")
    return size


def check_hidden_size(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises Refusal if a norm's weight has another size than the input."""
    if x.shape[-1] != weight.shape[-1]:
        raise Refusal(f"{op}: hidden_size is {weight.shape[-1]}, but the last dimension of x is {x.shape[-1]}")


def check_offsets(op: str, rows: int, stride: int) -> None:
    """Raises Refusal if rows so far apart end beyond what a kernel's int32 can count to."""
    if rows * stride > MOST_OFFSET:
        raise Refusal(f"{op}: the kernel counts in int32, and {rows} rows lie {stride} numbers apart")


def check_heads(op: str, heads: int, value_heads: int) -> None:
    """Raises Refusal unless each head of q and k serves as many heads of v."""
    if not heads or value_heads % heads:
        raise Refusal(f"{op}: {value_heads} heads of v are not a multiple of {heads} heads of q and k")


def slots_of(op: str, slots: torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor:
    """Each sequence's slot of the pool of states: those given, or the first ones. Raises Refusal if it is another number of slots."""
    if slots is None:
        return torch.arange(count, dtype=torch.int32, device=device)
    if len(slots) != count:
        raise Refusal(f"{op}: {len(slots)} slots for {count} sequences")
    return slots


def heads_of_packed(op: str, mixed_qkv: torch.Tensor, states: torch.Tensor) -> int:
    """The number of heads of q and k in packed rows, as the states ``[slots, value_heads, value_dim, key_dim]`` say. Raises Refusal if
    they do not fit.
    """
    value_heads, value_dim, key_dim = states.shape[1:]
    heads, rest = divmod(mixed_qkv.shape[1] - value_heads * value_dim, 2 * key_dim)
    if rest or heads <= 0:
        raise Refusal(f"{op}: a row of {mixed_qkv.shape[1]} numbers does not hold q, k and v for states {tuple(states.shape[1:])}")
    check_heads(op, heads, value_heads)
    return heads


def split_packed(op: str, mixed_qkv: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k ``[batch, heads, key_dim]`` and v ``[batch, value_heads, value_dim]`` of packed rows. Refuses as :func:`heads_of_packed`."""
    heads = heads_of_packed(op, mixed_qkv, states)
    value_heads, value_dim, key_dim = states.shape[1:]
    q, k, v = mixed_qkv.split([heads * key_dim, heads * key_dim, value_heads * value_dim], -1)
    return q.unflatten(1, (heads, key_dim)), k.unflatten(1, (heads, key_dim)), v.unflatten(1, (value_heads, value_dim))


def check_chunk_kernel(op: str, q: torch.Tensor, v: torch.Tensor) -> None:
    """Raises Refusal for what flash-linear-attention's kernels of chunks do not take.

    They hold keys of up to 256 numbers, a matrix product takes 16 or more, and they multiply in 16 bits.
    """
    check_heads(op, q.shape[2], v.shape[2])
    key_dim, value_dim = q.shape[3], v.shape[3]
    if key_dim > 256 or min(key_dim, value_dim) < 16:
        raise Refusal(f"{op}: the kernel supports keys of 16 to 256 numbers; found keys of {key_dim}, values of {value_dim}")
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise Refusal(f"{op}: the kernel supports bf16 and fp16; q is {q.dtype}")
