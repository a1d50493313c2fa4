# SPDX-License-Identifier: Apache-2.0
from sglang_fl.dispatch import BackendImplKind, BackendPriority, OpImpl, OpRegistry

from .backend import MyChipBackend

#: The operators that ``impl`` has.
OPERATORS = ("rms_norm",)


def register_builtins(registry: OpRegistry) -> None:
    """Called by sglang-fl, once in a process."""
    backend = MyChipBackend()
    registry.register_many(
        OpImpl(
            op,
            "vendor.mychip",
            BackendImplKind.VENDOR,
            getattr(backend, op),
            vendor=backend.vendor,
            priority=BackendPriority.VENDOR,
            # The activation dtypes that it takes; None: fp32, bf16 and fp16. A layer of another dtype goes to the next in order.
            # supported_dtypes=frozenset({"bfloat16", "float16"}),
            #
            # False only if a call that raises has never written its inputs: then another implementation may take the call over.
            writes_inputs=False,
            #
            # True if a row's result is the same, bit for bit, whatever else is in the batch: it then serves under
            # --enable-deterministic-inference, too.
            # batch_invariant=True,
        )
        for op in OPERATORS
    )
