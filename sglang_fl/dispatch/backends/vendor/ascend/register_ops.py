# SPDX-License-Identifier: Apache-2.0
from ....registry import OpRegistry
from ....types import BackendImplKind, BackendPriority, OpImpl
from .ascend import AscendBackend

_OPERATORS = ("silu_and_mul", "rms_norm", "rotary_embedding", "mrotary_embedding", "topk")


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
