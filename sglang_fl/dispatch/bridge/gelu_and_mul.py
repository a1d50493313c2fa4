# SPDX-License-Identifier: Apache-2.0
from typing import Any

from .base import ModelContext
from .elementwise import ElementwiseBridge
from .layer import Layer


class GeluAndMulBridge(ElementwiseBridge):
    """SGLang's GeluAndMul."""

    op = "gelu_and_mul"
    gated = True
    npu_switch = "SGLANG_NPU_FORWARD_NATIVE_GELUTANH"

    def attribute_reason(self, layer: Layer) -> str | None:
        return None if layer.approximate in ("none", "tanh") else f"approximate={layer.approximate!r}"

    def trial_key(self, layer: Layer, context: ModelContext) -> tuple[Any, ...]:
        return *super().trial_key(layer, context), layer.approximate
