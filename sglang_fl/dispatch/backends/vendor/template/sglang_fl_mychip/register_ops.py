# SPDX-License-Identifier: Apache-2.0
from sglang_fl.dispatch import OpRegistry

from .backend import BACKEND


def register_builtins(registry: OpRegistry) -> None:
    """Called by sglang-fl, once in a process."""
    registry.register_many(BACKEND.implementations())
