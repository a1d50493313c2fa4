# SPDX-License-Identifier: Apache-2.0
from .elementwise import ElementwiseBridge


class QuickGELUBridge(ElementwiseBridge):
    """SGLang's QuickGELU."""

    op = "quick_gelu"
