# SPDX-License-Identifier: Apache-2.0
from ...registry import OpRegistry
from .triton import BACKEND


def register_builtins(registry: OpRegistry) -> None:
    registry.register_many(BACKEND.implementations())
