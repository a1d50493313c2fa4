# SPDX-License-Identifier: Apache-2.0
"""Kernels that are registered with PyTorch's dispatcher."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def why_no_handles() -> str | None:
    """Why this PyTorch cannot keep a kernel callable that is overridden. None: it can."""
    return None if hasattr(torch.library, "get_kernel") else f"PyTorch {torch.__version__} has no torch.library.get_kernel"


def kernel_of(operator: str, dispatch_key: str) -> Callable[..., Any] | None:
    """What is registered for an operator, callable whatever is registered for it later. None: nothing is, or this PyTorch has no handles.

    Args:
        operator: ``aten::mul.Tensor``.
        dispatch_key: ``CUDA``, ``PrivateUse1``, ….
    """
    if why_no_handles() is not None:
        return None
    try:
        handle = torch.library.get_kernel(operator, dispatch_key)
    except RuntimeError:
        return None
    return functools.partial(handle.call_boxed, torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key)))
