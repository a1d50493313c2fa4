# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

from ....registry import OpRegistry
from ....types import device_here
from .cuda import BACKEND, VENDORS


def register_builtins(registry: OpRegistry) -> None:
    """As the device's own vendor, where it is one of those that run these kernels."""
    vendor = device_here().vendor
    backend = replace(BACKEND, vendor=vendor) if vendor in VENDORS else BACKEND
    registry.register_many(backend.implementations())
