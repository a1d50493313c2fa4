# SPDX-License-Identifier: Apache-2.0
import torch
from sgl_kernel import silu_and_mul as sgl_silu_and_mul
from sglang.kernels.ops.activation.activation import silu_and_mul as jit_silu_and_mul

#: What SGLang's own kernel loads at once: a row of the result must be a multiple of it.
_VECTOR_BYTES = 32 if torch.cuda.get_device_capability() >= (10, 0) else 16


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1] // 2
    if 2 * size != x.shape[-1]:
        raise ValueError(f"silu_and_mul: the last dimension holds two halves; it cannot be {x.shape[-1]}")
    out = x.new_empty((*x.shape[:-1], size))
    if out.numel():
        kernel = jit_silu_and_mul if size * x.itemsize % _VECTOR_BYTES == 0 else sgl_silu_and_mul
        kernel(x.contiguous(), out)
    return out
