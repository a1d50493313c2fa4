# SPDX-License-Identifier: Apache-2.0
from .elementwise import ElementwiseBridge


class NewGELUBridge(ElementwiseBridge):
    """SGLang's NewGELU."""

    op = "new_gelu"
    shared = True  # get_act_fn gives every caller the same object
