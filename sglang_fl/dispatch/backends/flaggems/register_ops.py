# SPDX-License-Identifier: Apache-2.0
from ...registry import OpRegistry
from ...types import BackendImplKind, BackendPriority, OpImpl
from .flaggems import FlagGemsBackend

#: operator -> whether a call that raises may have written its inputs.
_WRITES_INPUTS = {
    "fused_moe": False,
    "gelu_and_mul": False,
    "gemma_rms_norm": True,
    "mrotary_embedding": True,
    "new_gelu": False,
    "rms_norm": True,
    "rotary_embedding": True,
    "silu_and_mul": False,
    "topk": False,
}
#: Operators whose kernels do not take every activation dtype.
_DTYPES = {
    "fused_moe": frozenset({"bfloat16", "float16"}),
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
            supported_dtypes=_DTYPES.get(op),
            writes_inputs=writes_inputs,
        )
        for op, writes_inputs in _WRITES_INPUTS.items()
    )
