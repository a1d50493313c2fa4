# SPDX-License-Identifier: Apache-2.0
"""Reading and writing the slots of a pool of states, without asking the device which rows are padding.

Both work under graph capture: -1, which marks padding, is dealt with on the device.
"""

import torch


def read(pool: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The states of the slots, ``[len(slots), *pool.shape[1:]]``, new tensors; zero where a slot is -1."""
    states = pool[slots.clamp(min=0).long()].to(dtype)
    return states.masked_fill_(_column(slots < 0, states), 0)


def write(pool: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
    """Put states into their slots; those whose slot is -1 nowhere."""
    if not slots.numel():
        return
    used = slots >= 0
    # A row that is padding writes once more what the first that is none writes; if all are, slot 0 what it has.
    rows = torch.where(used, torch.arange(len(slots), device=slots.device), used.int().argmax())
    slots = slots[rows].clamp(min=0).long()
    states = states[rows].to(pool.dtype)
    pool[slots] = torch.where(_column(used.any(), states), states, pool[slots])


def _column(mask: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return mask.reshape(-1, *[1] * (states.dim() - 1))
