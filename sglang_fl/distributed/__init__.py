# SPDX-License-Identifier: Apache-2.0
"""Layer 3: SGLang's collectives over FlagCX, where the settings choose it."""

from typing import TYPE_CHECKING

from ..config import Settings

if TYPE_CHECKING:
    from .setup import FlagCXSetup

_setup: "FlagCXSetup | None" = None


def set_up_flagcx(settings: Settings, device_type: str, fallback: str) -> str:
    """Make SGLang's collectives use FlagCX in this process. Only the first call acts, before any group is created.

    Args:
        settings: the settings, which choose FlagCX.
        device_type: the device type of the tensors.
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
