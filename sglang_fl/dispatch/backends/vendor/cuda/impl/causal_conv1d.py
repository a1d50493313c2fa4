# SPDX-License-Identifier: Apache-2.0
"""SGLang's CUDA kernels of the causal convolution, compiled at their first use.

They sum in fp32. SGLang's Triton kernels, which hybrid models call by default, multiply in 16 bits. The CUDA kernels overwrite
their input, so they get a copy. They do not support trees.
"""

import torch
from sglang.kernels.ops.mamba import causal_conv1d as kernels

from .....types import Refusal
from ....checks import slots_of

_PADDING = -1


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, states: torch.Tensor) -> None:
    if not 2 <= weight.shape[1] <= 4 or weight.dtype != x.dtype:
        raise Refusal(
            f"{op}: the kernel supports a width of 2 to 4 and weights of x's dtype; weight is {tuple(weight.shape)}, {weight.dtype}"
        )
    if states.shape[2] != weight.shape[1] - 1 or not states.is_contiguous() or states.dtype != x.dtype:
        raise Refusal(f"{op}: the kernel supports a contiguous pool of x's dtype, with slots of {weight.shape[1] - 1} tokens")


def _contiguous(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: list[int],
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
) -> torch.Tensor:
    _check("causal_conv1d_fn", x, weight, conv_states)
    out = x.clone(memory_format=torch.contiguous_format)
    if x.numel():
        slots = None if cache_indices is None else cache_indices.int()
        starts = query_start_loc.int()
        kernels.causal_conv1d_fwd(
            out, weight.contiguous(), _contiguous(bias), conv_states, starts, slots, has_initial_state, activation is not None, _PADDING
        )
    return out


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: torch.Tensor | None = None,
    intermediate_conv_window: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    retrieve_next_token: torch.Tensor | None = None,
    retrieve_next_sibling: torch.Tensor | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
) -> torch.Tensor:
    _check("causal_conv1d_update", x, weight, conv_state)
    if intermediate_conv_window is not None or retrieve_next_token is not None:
        raise Refusal("causal_conv1d_update: the kernel does not store the state after each token, and does not support trees")
    out = x.clone(memory_format=torch.contiguous_format)
    if x.numel():
        # Without slots the kernel takes a pool of as many as there are sequences, and no larger one.
        slots = slots_of("causal_conv1d_update", conv_state_indices, len(x), x.device).int()
        tokens = out.unsqueeze(-1) if x.dim() == 2 else out
        kernels.causal_conv1d_update(
            tokens, conv_state, weight.contiguous(), _contiguous(bias), activation is not None, None, slots, _PADDING
        )
    return out
