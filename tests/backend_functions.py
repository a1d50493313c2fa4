# SPDX-License-Identifier: Apache-2.0
"""A backend's functions by operator, as attributes: ``reference.rms_norm(layer, x)``; and the references of SGLang's kernels."""

from collections.abc import Callable
from typing import Any

from sglang_fl.dispatch.backends import KernelTable
from sglang_fl.dispatch.backends.reference.reference import BACKEND
from sglang_fl.dispatch.kernel_implementations import KernelFunction, is_kernel
from sglang_fl.kernels.reference import REFERENCES


class Functions:
    def __init__(self, backend: KernelTable):
        self._backend = backend

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return self._backend.function(op).load()


reference = Functions(BACKEND)


def reference_of(op: str) -> Callable[..., Any]:
    """An operator's, or a kernel's, which takes the grid of a launch first."""
    if not is_kernel(op):
        function: Callable[..., Any] = getattr(reference, op)
        return function
    module, _, name = REFERENCES[op].function.partition(":")
    return KernelFunction(module, name, takes_grid=REFERENCES[op].takes_grid).load()
