# SPDX-License-Identifier: Apache-2.0
from ...registry import OpRegistry
from ...types import BackendImplKind, BackendPriority, OpImpl
from .flaggems import FlagGemsBackend

#: operator -> whether a call that raises may have written its inputs.
_WRITES_INPUTS = {
    "chunk_gated_delta_rule": True,
    "fused_moe": False,
    "fused_recurrent_gated_delta_rule": False,
    "fused_recurrent_gated_delta_rule_packed_decode": True,
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
    "chunk_gated_delta_rule": frozenset({"bfloat16", "float16"}),
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
