# SPDX-License-Identifier: Apache-2.0
"""Kernels that are registered with PyTorch's dispatcher."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def kernel_of(operator: str, dispatch_key: str) -> Callable[..., Any] | None:
    """What is registered for an operator, callable whatever is registered for it later. None: nothing is, or this PyTorch has no handles.

    Args:
        operator: ``aten::mul.Tensor``.
        dispatch_key: ``CUDA``, ``PrivateUse1``, ….
    """
    get_kernel = getattr(torch.library, "get_kernel", None)
    if get_kernel is None:
        return None
    try:
        handle = get_kernel(operator, dispatch_key)
    except RuntimeError:
        return None
    return functools.partial(handle.call_boxed, torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key)))
