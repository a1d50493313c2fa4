# SPDX-License-Identifier: Apache-2.0
"""The registry of implementations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .locks import ForkSafeLock
from .types import LazyFunction, OpImpl


@dataclass(frozen=True)
class OpRegistrySnapshot:
    """A snapshot of the registry."""

    impls_by_op: Mapping[str, tuple[OpImpl, ...]]


class OpRegistry:
    """Implementations by operator. Safe from threads and after a fork."""

    def __init__(self) -> None:
        self._impls: dict[str, dict[str, OpImpl]] = {}  # replaced by a change, never written: readers need no lock
        self._lock = ForkSafeLock()
        self.version = 0

    def register_impl(self, impl: OpImpl) -> None:
        """Register an implementation.

        Raises:
            ValueError: the operator has an implementation of that id already.
            TypeError: it is no OpImpl, or its parameters do not fit the operator's. Those of a function that is imported at its
                first use are looked at then.
        """
        self.register_many((impl,))

    def register_many(self, impls: Iterable[OpImpl]) -> None:
        """All of them, or none if one cannot be registered; raises as :meth:`register_impl`."""
        impls = list(impls)
        with self._lock:
            registered = {op: dict(by_id) for op, by_id in self._impls.items()}
            for impl in impls:
                if not isinstance(impl, OpImpl):
                    raise TypeError(f"expected an OpImpl, found {impl!r}")
                by_id = registered.setdefault(impl.op_name, {})
                if impl.impl_id in by_id:
                    raise ValueError(f"Duplicate impl_id {impl.impl_id!r} for op={impl.op_name!r}")
                if not isinstance(impl.fn, LazyFunction):
                    impl.function  # noqa: B018  # raises if the parameters do not fit
                by_id[impl.impl_id] = impl
            self._impls = registered
            self.version += 1

    def snapshot(self) -> OpRegistrySnapshot:
        return OpRegistrySnapshot({op: tuple(by_id.values()) for op, by_id in self._impls.items()})

    def implementations(self) -> list[OpImpl]:
        """Those of all operators."""
        return [impl for impls in self.snapshot().impls_by_op.values() for impl in impls]

    def get_implementations(self, op_name: str) -> list[OpImpl]:
        return list(self._impls.get(op_name, {}).values())

    def get_implementation(self, op_name: str, impl_id: str) -> OpImpl | None:
        return self._impls.get(op_name, {}).get(impl_id)

    def list_operators(self) -> list[str]:
        return sorted(self._impls)

    def clear(self) -> None:
        with self._lock:
            self._impls = {}
            self.version += 1
