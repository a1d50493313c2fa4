# SPDX-License-Identifier: Apache-2.0
import torch
from sgl_kernel import silu_and_mul as sgl_silu_and_mul
from sglang.kernels.ops.activation.activation import silu_and_mul as jit_silu_and_mul

#: What the kernels load at once: a row of the result must be a multiple of it.
_JIT_BYTES, _SGL_BYTES = 32 if torch.cuda.get_device_capability() >= (10, 0) else 16, 16


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1] // 2
    if 2 * size != x.shape[-1]:
        raise ValueError(f"silu_and_mul: the last dimension holds two halves; it cannot be {x.shape[-1]}")
    row_bytes = size * x.itemsize
    if row_bytes % _SGL_BYTES:
        # The kernel itself would read across an alignment that the device does not allow, and take the process with it.
        raise ValueError(f"silu_and_mul: the kernel needs rows of whole {_SGL_BYTES} bytes, and {size} {x.dtype} are {row_bytes}")
    out = x.new_empty((*x.shape[:-1], size))
    if out.numel():
        kernel = jit_silu_and_mul if row_bytes % _JIT_BYTES == 0 else sgl_silu_and_mul
        kernel(x.contiguous(), out)
    return out
