# SPDX-License-Identifier: Apache-2.0
from ...registry import OpRegistry
from ...types import BackendImplKind, BackendPriority, OpImpl
from .flaggems import FlagGemsBackend

#: operator -> whether a call that raises may have written its inputs.
_WRITES_INPUTS = {
    "gelu_and_mul": False,
    "gemma_rms_norm": True,
    "mrotary_embedding": True,
    "new_gelu": False,
    "rms_norm": True,
    "rotary_embedding": True,
    "silu_and_mul": False,
}


def register_builtins(registry: OpRegistry) -> None:
    backend = FlagGemsBackend()
    registry.register_many(
        OpImpl(
            op,
            "default.flagos",
            BackendImplKind.DEFAULT,
            getattr(backend, op),
            priority=BackendPriority.DEFAULT,
            writes_inputs=writes_inputs,
        )
        for op, writes_inputs in _WRITES_INPUTS.items()
    )
