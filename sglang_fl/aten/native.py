# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own kernel of an operator, callable while the operator is overridden."""

from collections.abc import Callable
from typing import Any

import torch

from ..utils.dispatcher import kernel_of

Function = Callable[..., Any]

_EXACT = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def native_kernel(key: str, dispatch_key: str) -> Function | None:
    """A function like FlagGems's, that calls PyTorch's kernel; to be taken before that is overridden. None: this PyTorch cannot keep it
    callable, or has none. A kernel that is composed of other operators calls whatever replaces these at that time.

    Args:
        key: the ATen operator, ``mul.Tensor``.
        dispatch_key: the device's, ``CUDA``.
    """
    kernel = kernel_of(f"aten::{key}", dispatch_key)
    if kernel is None:
        return None
    tensors = [index for index, argument in enumerate(schema_of(key).arguments) if str(argument.type) == "Tensor"]

    def native(*args: Any, **kwargs: Any) -> Any:
        # Python passes a 0-dim tensor argument as a number, which the kernel does not accept.
        numbers = [index for index in tensors if index < len(args) and isinstance(args[index], (int, float, complex))]
        if numbers:
            like = next((args[index] for index in tensors if isinstance(args[index], torch.Tensor)), None)
            args = tuple(_tensor(arg, like) if index in numbers else arg for index, arg in enumerate(args))
        return kernel(*args, **kwargs)

    return native


def schema_of(key: str) -> Any:
    name, _, overload = key.partition(".")
    return torch._C._get_schema(f"aten::{name}", overload)


def is_written(argument: Any) -> bool:
    """Whether an operator writes an argument of its schema."""
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _tensor(number: complex, like: torch.Tensor | None) -> torch.Tensor:
    """A number as a tensor without dimensions, of a dtype with which the result's is the same as for the number."""
    exact = torch.scalar_tensor(number, dtype=_EXACT[type(number)])
    if like is None or (like.dim() and torch.result_type(like, number) == torch.result_type(like, exact)):
        return exact
    return exact.to(torch.result_type(like, number))
