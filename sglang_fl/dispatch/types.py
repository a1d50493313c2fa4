# SPDX-License-Identifier: Apache-2.0
"""One implementation of one operator, and the words an order may use for it."""

import enum
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

from ..config import Settings, settings_in_force
from ..device import Device, canonical, detect, has_triton, probe
from ..utils.suggest import suggest
from .ops import FLBackendBase

#: The word of an order that leaves an operator to SGLang itself. It matches no OpImpl.
SGLANG = "sglang"


class Refusal(ValueError):
    """Raised by an implementation that does not take a call, before it writes anything. The next in the order takes the call.

    An implementation may also refuse with ValueError, TypeError or NotImplementedError. But these can come from anywhere inside
    it. So if it may have written its inputs, no other implementation is called after them.

    >>> def relu2(obj, x):
    ...     if x.dim() != 2:
    ...         raise Refusal(f"expected [tokens, hidden], found {x.dim()} dimensions")
    ...     return x.relu().square()
    >>> import torch
    >>> relu2(None, torch.ones(2, 3, 4))
    Traceback (most recent call last):
        ...
    sglang_fl.dispatch.types.Refusal: expected [tokens, hidden], found 3 dimensions
    """


class BackendImplKind(enum.StrEnum):
    """Where an implementation comes from; its value is the word for it in an order."""

    DEFAULT = "flagos"
    TRITON = "triton"
    REFERENCE = "reference"
    VENDOR = "vendor"


class BackendPriority(enum.IntEnum):
    """The usual ``priority`` of each kind; within one word of an order the higher goes first."""

    DEFAULT = 150
    TRITON = 125
    VENDOR = 100
    REFERENCE = 50


#: What the reason begins with why an implementation is not available whose check fails itself.
CHECK_RAISED = "its availability check raised"

_DTYPES = (
    "bfloat16 float16 half float32 float float64 double float4_e2m1fn_x2 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
    "float8_e8m0fnu bool uint8 uint16 uint32 uint64 int8 int16 short int32 int int64 long"
)
#: PyTorch's names for dtypes, so that it need not be imported to check one.
DTYPE_NAMES = frozenset(_DTYPES.split())


@dataclass(frozen=True)
class LazyFunction:
    """A function that is imported at its first use, so that a backend can be listed without its kernels.

    Attributes:
        module: its module's full name.
        name: its name there.
        why_unavailable: called with settings and a device, gives the reason why it cannot run there, or None. Without it the function
            runs everywhere.
    """

    module: str
    name: str
    why_unavailable: Callable[[Settings, Device], str | None] | None = None

    def load(self) -> Callable[..., Any]:
        return getattr(import_module(self.module), self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.load()(*args, **kwargs)


@dataclass(frozen=True)
class OpImpl:
    """An implementation of an operator.

    >>> def relu2(obj, x):
    ...     return x.relu().square()
    >>> impl = OpImpl("relu2", "vendor.fastchip", BackendImplKind.VENDOR, relu2, vendor="fastchip", writes_inputs=False)
    >>> print(impl)
    vendor(vendor.fastchip)
    >>> impl.is_available()
    True
    >>> OpImpl("relu2", "vendor.fastchip", BackendImplKind.VENDOR, relu2, vendor="fastchip", supported_dtypes={"bf16"})
    Traceback (most recent call last):
        ...
    ValueError: relu2: vendor.fastchip names the dtype 'bf16', which PyTorch does not have; did you mean 'bfloat16'?

    Attributes:
        op_name: the operator, a method of :class:`sglang_fl.dispatch.ops.FLBackendBase`.
        impl_id: unique for the operator: ``default.flagos``, ``triton.sglang_fl``, ``reference.torch``, ``vendor.<name>``.
        kind: where it comes from.
        fn: takes the operator's parameters, by their names and in any order. If its parameters cannot be read, it is called by
            keyword. ``fn._is_available()``, if there is one, says whether it can run on this machine. Otherwise the backend that it is a
            method of does. A :class:`LazyFunction` is imported when :attr:`function` is first read.
        vendor: whose chip it is for; required for VENDOR.
        priority: the higher goes first among those that a word of an order matches.
        supported_dtypes: the activation dtypes it takes, or their names (``"bfloat16"``), which need no import of PyTorch; a single one
            or several. None: all.
        min_arch: the least device capability, as ``(9, 0)``, ``"9.0"``, ``"sm90"`` or ``90``.
        writes_inputs: whether a call may have written its inputs when it raises. If so, while serving, another implementation
            takes over only after a :class:`Refusal`.
        batch_invariant: whether a row's result is the same, bit for bit, whatever else is in the
            batch. Only such run under ``--enable-deterministic-inference``.

    Raises:
        ValueError: a VENDOR implementation without a vendor, a dtype that PyTorch does not have, or a min_arch that cannot be read.
    """

    op_name: str
    impl_id: str
    kind: BackendImplKind
    fn: Callable[..., Any] = field(hash=False, repr=False)
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
            dtypes = _checked_dtypes(f"{self.op_name}: {self.impl_id}", self.supported_dtypes)
            object.__setattr__(self, "supported_dtypes", dtypes)
        parse_arch(self.min_arch)

    @cached_property
    def function(self) -> Callable[..., Any]:
        """What to call, with the operator's parameters: ``fn``, imported where it is a :class:`LazyFunction`, or an adapter to it.

        Cached after the first read.

        Raises:
            TypeError: the parameters of ``fn`` do not fit the operator's.
        """
        from .signature import fitted

        try:
            return fitted(self.op_name, self.fn.load() if isinstance(self.fn, LazyFunction) else self.fn)
        except TypeError as error:
            raise TypeError(f"{self.op_name}: {self.impl_id}: {error}") from None

    @property
    def module(self) -> str:
        """The module that its function is from; empty if it does not say."""
        return self.fn.module if isinstance(self.fn, LazyFunction) else str(getattr(self.fn, "__module__", None) or "")

    def __getstate__(self) -> dict[str, Any]:
        # Each process imports the function, or makes the adapter, itself.
        return {name: value for name, value in vars(self).items() if name != "function"}

    def dtypes(self) -> frozenset[Any] | None:
        """``supported_dtypes`` as PyTorch's own; None: all."""
        if self.supported_dtypes is None:
            return None
        import torch

        return frozenset(getattr(torch, dtype) if isinstance(dtype, str) else dtype for dtype in self.supported_dtypes)

    def is_available(self, settings: Settings | None = None, device: Device | None = None) -> bool:
        """Whether it can run on this machine; see :meth:`why_unavailable` for why not."""
        return self.why_unavailable(settings, device) is None

    def why_unavailable(self, settings: Settings | None = None, device: Device | None = None) -> str | None:
        """None if it can run on this machine, else the reason in words.

        An exception in the check means that it cannot, and is the reason.

        Args:
            settings: None: those in force in this process.
            device: None: the one that is detected.
        """
        try:
            reason = self._why_function_unavailable(settings, device)
        except Exception as error:
            return f"{CHECK_RAISED} {type(error).__name__}: {error}"
        if reason is not None:
            return reason
        wanted = parse_arch(self.min_arch)
        if wanted is not None:
            found = device_capability()
            if found is None:
                return f"it needs a device of capability {wanted[0]}.{wanted[1]}, and this device reports none"
            if found < wanted:
                return f"it needs a device of capability {wanted[0]}.{wanted[1]}; this one has {found[0]}.{found[1]}"
        return None

    def _why_function_unavailable(self, settings: Settings | None, device: Device | None) -> str | None:
        fn = self.fn
        if isinstance(fn, LazyFunction):
            if fn.why_unavailable is None:
                return None
            return fn.why_unavailable(settings or settings_in_force(), device or device_here())
        check = getattr(fn, "_is_available", None)
        if check is not None:
            return None if check() else getattr(fn, "_why_unavailable", None) or "its availability check returned False"
        backend = getattr(fn, "__self__", None)
        return backend.why_unavailable() if isinstance(backend, FLBackendBase) else None

    def __str__(self) -> str:
        return f"{self.kind.value}({self.impl_id})"


def _checked_dtypes(implementation: str, given: Any) -> frozenset[Any]:
    """Raises ValueError for anything that is neither a dtype nor the name of one."""
    torch = sys.modules.get("torch")  # whoever has a dtype has imported it
    dtypes = frozenset(given if isinstance(given, Iterable) and not isinstance(given, str) else (given,))
    for dtype in dtypes:
        if not (dtype in DTYPE_NAMES if isinstance(dtype, str) else torch is not None and isinstance(dtype, torch.dtype)):
            hint = suggest(str(dtype), DTYPE_NAMES)
            raise ValueError(f"{implementation} names the dtype {dtype!r}, which PyTorch does not have{hint}")
    return dtypes


def device_here() -> Device:
    """The device of this process: PyTorch is asked if it is loaded, the driver's files if not."""
    return detect() if "torch" in sys.modules else probe()


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


def trial_name(impl: OpImpl) -> str:
    """The name of an implementation in the record of trials."""
    return f"{impl.op_name}: {impl.impl_id}"


def match_token(impl: OpImpl, token: str) -> bool:
    """Whether a word of an order selects this implementation.

    ``flagos`` (FlagGems's kernels), ``triton`` (this package's own), ``reference`` and ``vendor`` mean a kind, ``vendor:<name>`` a
    vendor's (or a vendor backend by the name in its implementation ids), ``impl:<impl_id>`` a single one. ``sglang`` means none of ours.
    """
    head, colon, tail = token.partition(":")
    if not colon:
        return impl.kind.value == token
    if head == "vendor":
        return impl.kind is BackendImplKind.VENDOR and (canonical(impl.vendor or "") == canonical(tail) or impl.impl_id == f"vendor.{tail}")
    return head == "impl" and impl.impl_id == tail


def why_left_to_triton(op: str, settings: Settings, device: Device) -> str | None:
    """Why an implementation does not replace a Triton kernel of SGLang's. None: the device has no Triton, or the operator has an order."""
    if op in dict(settings.op_backends) or not has_triton(device):
        return None
    return "SGLang's own kernel runs on this device"
