# SPDX-License-Identifier: Apache-2.0
"""Sources of kernels: each is a table of functions.

A backend knows its kernels, ``dispatch.types`` and the helpers beside it; never another backend, and never SGLang, but for
``vendor/cuda``, whose kernels SGLang ships.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...config import Settings
from ...device import Device
from ..ops import FLBackendBase as Backend
from ..types import BackendImplKind, BackendPriority, LazyFunction, OpImpl

__all__ = ["Backend", "Kernel", "KernelTable"]


@dataclass(frozen=True)
class Kernel:
    """A table's entry for an operator.

    Attributes:
        function: ``"module:function"``, with the module's name within the backend's package. It takes what the operator's
            method of :class:`sglang_fl.dispatch.ops.FLBackendBase` takes, and is imported at its first use.
        why_unavailable: as in :class:`KernelTable`, for this operator only.
        writes_inputs, dtypes, min_arch, batch_invariant: as in :class:`~sglang_fl.dispatch.types.OpImpl`.
    """

    function: str
    writes_inputs: bool = True
    dtypes: Iterable[Any] | str | None = None
    min_arch: Any = None
    batch_invariant: bool = False
    why_unavailable: Callable[[Settings, Device], str | None] | None = None


@dataclass(frozen=True)
class KernelTable:
    """A backend as data.

    Attributes:
        package: the full name of the package that has the functions; ``__package__`` in a module of it.
        impl_id: of all its implementations.
        kind: where they come from.
        kernels: the operators that it has.
        vendor: whose chip it is for; None: any.
        why_unavailable: called with settings and a device, gives the reason why it cannot run there, or None. It imports nothing
            heavy: the command line calls it, too. Without it the backend runs everywhere.
    """

    package: str
    impl_id: str
    kind: BackendImplKind
    kernels: Mapping[str, Kernel]
    vendor: str | None = None
    why_unavailable: Callable[[Settings, Device], str | None] | None = None

    def function(self, op: str) -> LazyFunction:
        kernel = self.kernels[op]
        module, _, name = kernel.function.partition(":")
        return LazyFunction(f"{self.package}.{module}", name, kernel.why_unavailable or self.why_unavailable)

    def implementations(self) -> list[OpImpl]:
        """What a registry takes, one for each operator."""
        return [
            OpImpl(
                op,
                self.impl_id,
                self.kind,
                self.function(op),
                vendor=self.vendor,
                priority=BackendPriority[self.kind.name],
                supported_dtypes=kernel.dtypes,  # type: ignore[arg-type]  # OpImpl makes a set of it
                min_arch=kernel.min_arch,
                writes_inputs=kernel.writes_inputs,
                batch_invariant=kernel.batch_invariant,
            )
            for op, kernel in self.kernels.items()
        ]
