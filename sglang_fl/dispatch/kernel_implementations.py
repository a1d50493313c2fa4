# SPDX-License-Identifier: Apache-2.0
"""Implementations of SGLang's own kernels: what packages declare for their chips, and the references in plain PyTorch.

The operator's name is the kernel's, ``sglang.module:name``. A function is called with a launch's grid first, None in a plain call.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from ..config import Settings
from ..device import Device, declared, has_triton, target_problem
from ..kernels.reference import REFERENCES
from .registry import OpRegistry
from .types import BackendImplKind, BackendPriority, LazyFunction, OpImpl, why_left_to_triton


@dataclass(frozen=True)
class KernelFunction(LazyFunction):
    """A replacement's function, called with the grid first whether it takes it or not."""

    takes_grid: bool = False

    def load(self) -> Callable[..., Any]:
        function = super().load()
        if self.takes_grid:
            return function

        def without_grid(grid: Any, /, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return without_grid


def is_kernel(op: str) -> bool:
    """Whether an operator's name is that of a kernel of SGLang's."""
    return target_problem(op) is None


def names_of(op: str) -> set[str]:
    """The names by which lists and options may mean an operator: its own, and of a kernel also the part behind the module."""
    return {op, op.rpartition(":")[2]}


def register_builtins(registry: OpRegistry) -> None:
    """Register the references, and what each installed package declares of its chip."""
    references = ((None, target, given, partial(why_left_to_triton, target)) for target, given in REFERENCES.items())
    declarations = (
        (vendor, target, given, partial(_why_not_this_chip, vendor))
        for vendor, platform in declared().platforms.items()
        for target, given in platform.kernels().items()
    )
    for vendor, target, given, why_unavailable in chain(references, declarations):
        module, _, name = given.function.partition(":")
        kind = BackendImplKind.REFERENCE if vendor is None else BackendImplKind.VENDOR
        impl = OpImpl(
            target,
            "reference.torch" if vendor is None else f"vendor.{vendor}",
            kind,
            KernelFunction(module, name, why_unavailable, given.takes_grid),
            vendor=vendor,
            priority=BackendPriority[kind.name],
            writes_inputs=given.writes_inputs,
            batch_invariant=given.batch_invariant,
        )
        registry.register_impl(impl)


def may_be_replaced(settings: Settings, device: Device) -> bool:
    """Whether it is worth to look for what replaces SGLang's kernels in a process that runs no model; imports nothing."""
    declaration = declared().platforms.get(device.vendor)
    ordered = any(is_kernel(op) for op, _ in settings.op_backends)
    return ordered or not has_triton(device) or bool(declaration and declaration.sglang_kernels)


def replaceable(registry: OpRegistry, settings: Settings, device: Device) -> list[str]:
    """SGLang's kernels that have an available implementation on this device."""
    kernels = filter(is_kernel, registry.list_operators())
    return [op for op in kernels if any(impl.is_available(settings, device) for impl in registry.get_implementations(op))]


def exclusion_reason(settings: Settings, target: str) -> str | None:
    """Why a kernel stays with SGLang whatever the policy says, or None. A whitelist is of layers: it says nothing of kernels."""
    return replace(settings, oot_whitelist=None).exclusion_reason(names_of(target))


def _why_not_this_chip(vendor: str, settings: Settings, device: Device) -> str | None:
    return None if device.vendor == vendor else f"this device is {device.vendor}"
