# SPDX-License-Identifier: Apache-2.0
"""One implementation of one operator, and the words an order may use for it."""

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..device.vendors import canonical
from .ops import FLBackendBase

#: The word of an order that leaves an operator to SGLang itself. No OpImpl answers to it.
SGLANG = "sglang"


class Refusal(ValueError):
    """An implementation does not take a call, and has written nothing: the next in the order may take it.

    The others by which the contract lets one refuse (ValueError, TypeError, NotImplementedError) may come from anywhere in it, and
    an implementation that writes its inputs is not retried after them.
    """


class BackendImplKind(enum.StrEnum):
    """Where an implementation comes from; its value is the word for it in an order."""

    DEFAULT = "flagos"
    REFERENCE = "reference"
    VENDOR = "vendor"


class BackendPriority(enum.IntEnum):
    """The usual ``priority`` of each kind; within one word of an order the higher goes first."""

    DEFAULT = 150
    VENDOR = 100
    REFERENCE = 50


@dataclass(frozen=True)
class OpImpl:
    """An implementation of an operator.

    Attributes:
        op_name: the operator, a method of :class:`sglang_fl.dispatch.ops.FLBackendBase`.
        impl_id: unique for the operator: ``default.flagos``, ``reference.torch``, ``vendor.<name>``.
        kind: where it comes from.
        fn: called as the operator's signature says. A function ``fn._is_available`` tells whether
            it can run on this machine; without one, the backend whose method ``fn`` is tells it.
        vendor: whose chip it is for; required for VENDOR.
        priority: the higher goes first among those that a word of an order matches.
        supported_dtypes: the activation dtypes it takes, or their names (``"bfloat16"``), so that PyTorch
            need not be imported to say it; None: all.
        min_arch: the least device capability, as ``(9, 0)``, ``"9.0"``, ``"sm90"`` or ``90``.
        writes_inputs: whether a call may have written its inputs when it raises. While serving, a call of one that
            may have is given to another implementation after a :class:`Refusal` only.
        batch_invariant: whether a row's result is the same, bit for bit, whatever else is in the
            batch. Only such run under ``--enable-deterministic-inference``.

    Raises:
        ValueError: a VENDOR implementation without a vendor, or a min_arch that cannot be read.
    """

    op_name: str
    impl_id: str
    kind: BackendImplKind
    fn: Callable[..., Any]
    vendor: str | None = None
    priority: int = 0
    supported_dtypes: frozenset[Any] | None = None
    min_arch: Any = None
    writes_inputs: bool = True
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.kind is BackendImplKind.VENDOR and not self.vendor:
            raise ValueError(f"{self.op_name}: the VENDOR implementation {self.impl_id!r} names no vendor")
        if self.supported_dtypes is not None:
            object.__setattr__(self, "supported_dtypes", frozenset(self.supported_dtypes))
        parse_arch(self.min_arch)

    def dtypes(self) -> frozenset[Any] | None:
        """``supported_dtypes`` as PyTorch's own; None: all.

        Raises:
            ValueError: PyTorch has no such dtype.
        """
        if self.supported_dtypes is None:
            return None
        import torch

        found = {name: getattr(torch, name, None) if isinstance(name, str) else name for name in self.supported_dtypes}
        for name, dtype in found.items():
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{self.op_name}: {self.impl_id} names the dtype {name!r}, which PyTorch does not have")
        return frozenset(found.values())

    def is_available(self) -> bool:
        """Whether it can run on this machine; see :meth:`why_unavailable` for why not."""
        return self.why_unavailable() is None

    def why_unavailable(self) -> str | None:
        """None if it can run on this machine, else the reason in words.

        An exception in the check means that it cannot, and is the reason.
        """
        check = getattr(self.fn, "_is_available", None)
        backend = getattr(self.fn, "__self__", None)
        try:
            if check is not None:
                why = None if check() else getattr(self.fn, "_why_unavailable", None) or "its availability check says no"
            else:
                why = backend.why_unavailable() if isinstance(backend, FLBackendBase) else None
        except Exception as error:
            return f"its availability check raised {type(error).__name__}: {error}"
        if why is not None:
            return why
        wanted = parse_arch(self.min_arch)
        if wanted is not None:
            found = device_capability()
            if found is None:
                return f"it needs a device of capability {wanted[0]}.{wanted[1]}, and this device states none"
            if found < wanted:
                return f"it needs a device of capability {wanted[0]}.{wanted[1]}; this one has {found[0]}.{found[1]}"
        return None

    def __str__(self) -> str:
        return f"{self.kind.value}({self.impl_id})"


def parse_arch(arch: Any) -> tuple[int, int] | None:
    """``(9, 0)``, ``"9.0"``, ``"sm90"`` and ``90`` all mean capability 9.0."""
    if arch is None:
        return None
    if isinstance(arch, tuple) and len(arch) == 2 and all(isinstance(n, int) for n in arch):
        return arch[0], arch[1]
    match = re.fullmatch(r"(?:sm_?)?(\d+)(?:\.(\d+)|(\d))", str(arch).strip().lower())
    if not match:
        raise ValueError(f"min_arch {arch!r} is none of (9, 0), '9.0', 'sm90', 90")
    return int(match[1]), int(match[2] if match[2] is not None else match[3])


def device_capability() -> tuple[int, int] | None:
    """The capability of the current device where it has one (CUDA and what imitates it)."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major, minor


def match_token(impl: OpImpl, token: str) -> bool:
    """Whether a word of an order means this implementation.

    ``flagos``, ``reference`` and ``vendor`` mean a kind, ``vendor:<name>`` a vendor's (or a vendor backend by the
    name in its implementation ids), ``impl:<impl_id>`` a single one. ``sglang`` means none of ours.
    """
    head, colon, tail = token.partition(":")
    if not colon:
        return impl.kind.value == token
    if head == "vendor":
        return impl.kind is BackendImplKind.VENDOR and (canonical(impl.vendor or "") == canonical(tail) or impl.impl_id == f"vendor.{tail}")
    return head == "impl" and impl.impl_id == tail
