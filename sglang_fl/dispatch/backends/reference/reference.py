# SPDX-License-Identifier: Apache-2.0
"""The reference: every operator in plain PyTorch, fp32 inside, one rounding at the end, inputs never written."""

from functools import partial

from ...types import BackendImplKind, why_left_to_triton
from .. import Kernel, KernelTable

_FUNCTIONS = {
    "silu_and_mul": "impl.activation:silu_and_mul",
    "gelu_and_mul": "impl.activation:gelu_and_mul",
    "new_gelu": "impl.activation:new_gelu",
    "quick_gelu": "impl.activation:quick_gelu",
    "relu2": "impl.activation:relu2",
    "rms_norm": "impl.normalization:rms_norm",
    "gemma_rms_norm": "impl.normalization:gemma_rms_norm",
    "layer_norm": "impl.normalization:layer_norm",
    "rotary_embedding": "impl.rotary:rotary_embedding",
    "mrotary_embedding": "impl.rotary:mrotary_embedding",
    "topk": "impl.moe:topk",
    "fused_moe": "impl.moe:fused_moe",
    "chunk_gated_delta_rule": "impl.gated_delta_rule:chunk_gated_delta_rule",
    "fused_recurrent_gated_delta_rule": "impl.gated_delta_rule:fused_recurrent_gated_delta_rule",
    "fused_recurrent_gated_delta_rule_packed_decode": "impl.gated_delta_rule:fused_recurrent_gated_delta_rule_packed_decode",
}
#: On a device with Triton these are used only if the operator has an order. By default SGLang's Triton kernels run.
_WITHOUT_TRITON = {
    "fused_sigmoid_gating_delta_rule_update": "impl.gated_delta_rule:fused_sigmoid_gating_delta_rule_update",
    "causal_conv1d_fn": "impl.causal_conv1d:causal_conv1d_fn",
    "causal_conv1d_update": "impl.causal_conv1d:causal_conv1d_update",
}

BACKEND = KernelTable(
    __package__,
    "reference.torch",
    BackendImplKind.REFERENCE,
    {op: Kernel(function, writes_inputs=False) for op, function in _FUNCTIONS.items()}
    | {op: Kernel(function, why_unavailable=partial(why_left_to_triton, op)) for op, function in _WITHOUT_TRITON.items()},
)
