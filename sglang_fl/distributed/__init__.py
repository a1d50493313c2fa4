# SPDX-License-Identifier: Apache-2.0
"""Layer 3: SGLang's collectives over FlagCX, where the settings choose it, and nothing at all where they do not."""

from typing import TYPE_CHECKING

from ..config import Settings

if TYPE_CHECKING:
    from .setup import Doors

_doors: "Doors | None" = None


def open_doors(settings: Settings, device_type: str, fallback: str) -> str:
    """Bring SGLang's collectives to FlagCX in this process; the first call does it, before any group is made.

    Args:
        settings: in which FlagCX is chosen.
        device_type: the device type whose tensors are meant.
        fallback: the vendor's own ``torch.distributed`` backend, for when the ranks do not agree.

    Returns:
        the name of the ``torch.distributed`` backend.
    """
    global _doors
    from .setup import NAME, Doors

    if _doors is None:
        doors = Doors(settings, device_type, fallback)
        doors.register_backend()
        doors.hook_group_coordinator()
        _doors = doors
    return NAME
