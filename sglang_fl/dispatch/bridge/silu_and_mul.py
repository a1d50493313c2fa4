# SPDX-License-Identifier: Apache-2.0
from .base import ModelContext
from .elementwise import ElementwiseBridge
from .layer import Layer


class SiluAndMulBridge(ElementwiseBridge):
    """SGLang's SiluAndMul."""

    op = "silu_and_mul"
    gated = True

    def exclusion_reason(self, layer: Layer, context: ModelContext) -> str | None:
        if context.fuses_activation:
            return "SGLang fuses it with the FP8 quantisation that follows"
        return super().exclusion_reason(layer, context)
