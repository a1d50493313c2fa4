# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
from sgl_kernel import silu_and_mul as sgl_silu_and_mul
from sglang.kernels.ops.activation.activation import activation_module
from sglang.kernels.ops.activation.activation import relu2 as jit_relu2
from sglang.kernels.ops.activation.activation import silu_and_mul as jit_silu_and_mul
from sglang.srt.utils.custom_op import register_custom_op

from ....checks import half_of

#: What the kernels load at once: a row of the result must be a multiple of it.
_JIT_BYTES, _SGL_BYTES = 32 if torch.cuda.get_device_capability() >= (10, 0) else 16, 16
#: How SGLang's kernel calls the two kinds of GELU.
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def _check_rows(op: str, size: int, x: torch.Tensor, load_bytes: int) -> int:
    """The bytes of a row of the result. A kernel that loads across an alignment takes the process with it."""
    row_bytes = size * x.itemsize
    if row_bytes % load_bytes:
        raise ValueError(f"{op}: the kernel needs rows of a multiple of {load_bytes} bytes; {size} {x.dtype} are {row_bytes}")
    return row_bytes


def _exact_gelu_and_mul(name: str, x: torch.Tensor, out: torch.Tensor) -> None:
    # Without fast math, which SGLang's own call has: its tanh is right to 11 bits, and the tail of GELU to none.
    kernels = activation_module(x.dtype, fast_math=False)
    kernels.run_activation(x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1]), name)


_run_gelu_and_mul = register_custom_op(_exact_gelu_and_mul, op_name="sglang_fl_gelu_and_mul", mutates_args=["out"])


def gelu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    size = half_of("gelu_and_mul", x)
    _check_rows("gelu_and_mul", size, x, _JIT_BYTES)
    out = x.new_empty((*x.shape[:-1], size))
    if out.numel():
        _run_gelu_and_mul(_GELU[obj.approximate], x.contiguous(), out)
    return out


def relu2(obj: Any, x: torch.Tensor) -> torch.Tensor:
    _check_rows("relu2", x.shape[-1], x, _JIT_BYTES)
    out = x.new_empty(x.shape)
    if out.numel():
        jit_relu2(x.contiguous(), out)
    return out


def silu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    size = half_of("silu_and_mul", x)
    row_bytes = _check_rows("silu_and_mul", size, x, _SGL_BYTES)
    out = x.new_empty((*x.shape[:-1], size))
    if out.numel():
        kernel = jit_silu_and_mul if row_bytes % _JIT_BYTES == 0 else sgl_silu_and_mul
        kernel(x.contiguous(), out)
    return out
