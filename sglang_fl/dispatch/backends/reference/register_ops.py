# SPDX-License-Identifier: Apache-2.0
from ...registry import OpRegistry
from .reference import BACKEND


def register_builtins(registry: OpRegistry) -> None:
    registry.register_many(BACKEND.implementations())
