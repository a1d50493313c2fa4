# SPDX-License-Identifier: Apache-2.0
"""The reference: every operator in plain PyTorch, fp32 inside, one rounding at the end, inputs never written."""

from functools import partial

from ...types import BackendImplKind, why_left_to_triton
from .. import Kernel, KernelTable

#: Module -> its functions, each under its operator's name.
_FUNCTIONS = {
    "impl.activation": ("silu_and_mul", "gelu_and_mul", "new_gelu", "quick_gelu", "relu2"),
    "impl.normalization": ("rms_norm", "gemma_rms_norm", "layer_norm"),
    "impl.rotary": ("rotary_embedding", "mrotary_embedding"),
    "impl.moe": ("topk", "fused_moe"),
    "impl.gated_delta_rule": (
        *("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
        "fused_recurrent_gated_delta_rule_packed_decode",
    ),
}
#: On a device with Triton these are used only if the operator has an order. By default SGLang's Triton kernels run.
_WITHOUT_TRITON = {
    "impl.gated_delta_rule": ("fused_sigmoid_gating_delta_rule_update",),
    "impl.causal_conv1d": ("causal_conv1d_fn", "causal_conv1d_update"),
}

_KERNELS = {op: Kernel(f"{module}:{op}", writes_inputs=False) for module, ops in _FUNCTIONS.items() for op in ops}
for _module, _ops in _WITHOUT_TRITON.items():
    _KERNELS |= {op: Kernel(f"{_module}:{op}", why_unavailable=partial(why_left_to_triton, op)) for op in _ops}

BACKEND = KernelTable(__package__, "reference.torch", BackendImplKind.REFERENCE, _KERNELS)
