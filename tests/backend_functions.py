# SPDX-License-Identifier: Apache-2.0
"""A backend's functions by operator, as attributes: ``reference.rms_norm(layer, x)``."""

from collections.abc import Callable
from typing import Any

from sglang_fl.dispatch.backends import KernelTable
from sglang_fl.dispatch.backends.reference.reference import BACKEND


class Functions:
    def __init__(self, backend: KernelTable):
        self._backend = backend

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return self._backend.function(op).load()


reference = Functions(BACKEND)
