# SPDX-License-Identifier: Apache-2.0
"""SGLang's kernels in plain PyTorch."""

from collections.abc import Mapping

from ...device import KernelReplacement

_OPS, _HERE = "sglang.kernels.ops", "sglang_fl.kernels.reference"


def _plain(file: str, *names: str, writes_inputs: bool = False, batch_invariant: bool = False) -> dict[str, KernelReplacement]:
    options = {"writes_inputs": writes_inputs, "batch_invariant": batch_invariant}
    return {name: KernelReplacement(f"{_HERE}.{file}:{name}", **options) for name in names}


def _launched(file: str, *names: str) -> dict[str, KernelReplacement]:
    return {name: KernelReplacement(f"{_HERE}.{file}:{name}", takes_grid=True, batch_invariant=True) for name in names}


#: module -> its names -> replacement. Kernels that only compute integers or copy are batch-invariant.
_BY_MODULE: dict[str, dict[str, KernelReplacement]] = {
    f"{_OPS}.memory.allocator": _launched("slots", "alloc_extend_kernel", "alloc_decode_kernel"),
    f"{_OPS}.memory.common": _plain("slots", "get_last_loc_triton", "get_last_loc_triton_safe", batch_invariant=True),
    "sglang.srt.mem_cache.allocation": _launched("slots", "assign_req_to_token_pool"),
    f"{_OPS}.attention.position": _plain("slots", "compute_position_triton", batch_invariant=True),
    f"{_OPS}.attention.kv_indices": _launched("slots", "create_flashinfer_kv_indices_triton", "create_chunked_prefix_cache_kv_indices"),
    f"{_OPS}.activation.softcap": _plain("logits", "softcap_inplace_logits", writes_inputs=True, batch_invariant=True),
    f"{_OPS}.sampling.murmur_hash": _plain("logits", "murmur_hash32", batch_invariant=True),
    f"{_OPS}.attention.triton_gdn_fused_proj": _plain(
        "gated_delta_net",
        *("fused_qkvzba_split_reshape_cat", "fused_qkvzba_split_reshape_cat_contiguous", "fused_qkv_split_gdn_prefill"),
        batch_invariant=True,
    ),
    f"{_OPS}.attention.linear.fused_gdn_gating": _plain("gated_delta_net", "fused_gdn_gating"),
    f"{_OPS}.attention.fla.layernorm_gated": _plain("gated_delta_net", "rms_norm_gated"),
    f"{_OPS}.attention.fla.fused_norm_gate": {
        "rms_norm_gated": KernelReplacement(f"{_HERE}.gated_delta_net:fla_rms_norm_gated", writes_inputs=False)
    },
    "sglang.srt.models.utils": _plain("gated_delta_net", "fused_qk_gemma_rmsnorm", "fused_qk_gemma_rmsnorm_with_gate"),
    f"{_OPS}.elementwise.elementwise": {
        **_plain("gates", "fused_sigmoid_mul", "fused_gate_sigmoid_mul_add", writes_inputs=True),
        **_plain("gates", "fused_gate_sigmoid_mul"),
    },
}

#: ``sglang.module:name`` -> replacement, used where the device has no Triton, or an order says ``reference``.
REFERENCES: Mapping[str, KernelReplacement] = {
    f"{module}:{name}": replacement for module, found in _BY_MODULE.items() for name, replacement in found.items()
}
