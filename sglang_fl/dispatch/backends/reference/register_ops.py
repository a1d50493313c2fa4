# SPDX-License-Identifier: Apache-2.0
from ...ops import OPERATORS
from ...registry import OpRegistry
from ...types import BackendImplKind, BackendPriority, OpImpl
from .reference import ReferenceBackend


def register_builtins(registry: OpRegistry) -> None:
    """The reference has every operator."""
    backend = ReferenceBackend()
    registry.register_many(
        OpImpl(
            op,
            "reference.torch",
            BackendImplKind.REFERENCE,
            getattr(backend, op),
            priority=BackendPriority.REFERENCE,
            writes_inputs=False,
        )
        for op in OPERATORS
    )
