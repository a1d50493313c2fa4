# SPDX-License-Identifier: Apache-2.0
from ....registry import OpRegistry
from ....types import BackendImplKind, BackendPriority, OpImpl
from .ascend import AscendBackend

_OPERATORS = (
    "gelu_and_mul",
    "gemma_rms_norm",
    "layer_norm",
    "mrotary_embedding",
    "new_gelu",
    "quick_gelu",
    "rms_norm",
    "rotary_embedding",
    "silu_and_mul",
    "topk",
)


def register_builtins(registry: OpRegistry) -> None:
    backend = AscendBackend()
    registry.register_many(
        OpImpl(
            op,
            "vendor.ascend",
            BackendImplKind.VENDOR,
            getattr(backend, op),
            vendor=backend.vendor,
            priority=BackendPriority.VENDOR,
            writes_inputs=False,
        )
        for op in _OPERATORS
    )
