# SPDX-License-Identifier: Apache-2.0
"""Layer 3: SGLang's collectives over FlagCX, where the settings choose it."""

from typing import TYPE_CHECKING

from ..config import Settings

if TYPE_CHECKING:
    from .setup import FlagCXSetup

_setup: "FlagCXSetup | None" = None


def set_up_flagcx(settings: Settings, device_type: str, fallback: str) -> str:
    """Make SGLang's collectives use FlagCX in this process; the first call does it, before any group is made.

    Args:
        settings: in which FlagCX is chosen.
        device_type: the device type whose tensors are meant.
        fallback: the vendor's own ``torch.distributed`` backend, for when the ranks do not agree.

    Returns:
        the name of the ``torch.distributed`` backend.
    """
    global _setup
    from .setup import NAME, FlagCXSetup

    if _setup is None:
        flagcx = FlagCXSetup(settings, device_type, fallback)
        flagcx.register_backend()
        flagcx.hook_group_coordinator()
        _setup = flagcx
    return NAME
