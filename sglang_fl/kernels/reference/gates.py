# SPDX-License-Identifier: Apache-2.0
"""Gates of attention and of shared experts. Arithmetic is in fp32."""

from typing import Any

import torch


def fused_sigmoid_mul(attn_output: torch.Tensor, gate: torch.Tensor, inplace: bool = False, **options: Any) -> torch.Tensor:
    """``attn_output * sigmoid(gate)``. The gate may be [tokens, heads, head_dim] with attn_output [tokens, heads * head_dim]."""
    if options.get("quant"):
        raise NotImplementedError("fused_sigmoid_mul in plain PyTorch does not quantise its result")
    result = (attn_output.float() * gate.float().sigmoid().reshape(attn_output.shape)).to(attn_output.dtype)
    return attn_output.copy_(result) if inplace else result


def fused_gate_sigmoid_mul(hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor) -> torch.Tensor:
    """``shared_output * sigmoid(hidden_states @ gate_weight)``, one gate per token."""
    return _gated(hidden_states, gate_weight, shared_output).to(shared_output.dtype)


def fused_gate_sigmoid_mul_add(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor, final_hidden_states: torch.Tensor
) -> None:
    """Add the same to ``final_hidden_states``."""
    final_hidden_states.copy_(final_hidden_states.float() + _gated(hidden_states, gate_weight, shared_output))


def _gated(hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor) -> torch.Tensor:
    gate = (hidden_states.float() * gate_weight.float()).sum(-1, keepdim=True).sigmoid()
    return shared_output.float() * gate
