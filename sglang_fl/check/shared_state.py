# SPDX-License-Identifier: Apache-2.0
"""PyTorch's process-wide and thread-wide state, which other layers and sampling use."""

from collections.abc import Callable
from typing import Any

import torch

#: name, getter, setter
_SHARED: tuple[tuple[str, Callable[[], Any], Callable[[Any], Any]], ...] = (
    ("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("default device", torch.get_default_device, torch.set_default_device),
    ("gradients", torch.is_grad_enabled, torch.set_grad_enabled),
    ("number of threads", torch.get_num_threads, torch.set_num_threads),
    ("deterministic algorithms", torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
)


def shared_state() -> list[Any]:
    return [get() for _, get, _ in _SHARED]


def restore(before: list[Any]) -> list[str]:
    """Restore changed state. Returns the changes as text."""
    changes = []
    for (name, get, put), value in zip(_SHARED, before, strict=True):
        now = get()
        if now != value:
            changes.append(f"{name}: from {value} to {now}")
            put(value)
    return changes


def random_states(device: torch.device) -> list[torch.Tensor]:
    """The states of the random generators that serving uses: the CPU's and the device's."""
    module = getattr(torch, device.type, None)
    states = [torch.get_rng_state()]
    return [*states, module.get_rng_state()] if device.type != "cpu" and hasattr(module, "get_rng_state") else states  # type: ignore[union-attr]
