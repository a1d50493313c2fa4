# SPDX-License-Identifier: Apache-2.0
from .elementwise import ElementwiseBridge


class ReLU2Bridge(ElementwiseBridge):
    """SGLang's ReLU2."""

    op = "relu2"
    shared = True  # get_act_fn gives every caller the same object
