# SPDX-License-Identifier: Apache-2.0
"""Records the ATen calls of a served model that FlagGems would receive, selects some, and describes them.

Calls that an operator makes internally are recorded too, since they also reach a registered FlagGems function.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..startup.words import flaggems_table
from .judge import rough_us

DISPATCH_KEYS = {"cuda": "CUDA", "cpu": "CPU"}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "int32": "i32", "int64": "i64"}


class Recorder(TorchDispatchMode):
    """Counts the ATen calls of the thread that started it, by operator, arguments and label.

    Attributes:
        label: the current step.
        counts: (operator, arguments, named arguments) -> label -> calls.
    """

    #: Without it a higher-order operator under the mode is an error.
    supports_higher_order_operators = True

    def __init__(self, device_type: str):
        super().__init__()
        self.label, self.device_type = "", device_type
        self.counts: dict[tuple[Any, ...], dict[str, int]] = {}
        self._key = DISPATCH_KEYS.get(device_type, "PrivateUse1")
        self._routes: dict[Any, Any] = {}
        self._library: torch.library.Library | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled. Only their calls at run time are seen."""
        return True

    def start(self) -> None:
        """Start recording in this thread."""
        self._keep_composites_whole()
        self.__enter__()

    def stop(self) -> None:
        self.__exit__(None, None, None)
        if self._library is not None:
            self._library._destroy()

    def _keep_composites_whole(self) -> None:
        """Give operators that PyTorch decomposes early a kernel that decomposes them later.

        FlagGems registers some of them (``pad``, ``true_divide``), and PyTorch then calls FlagGems instead of decomposing.
        Without a kernel they would be decomposed before a mode sees them.
        """
        self._library = torch.library.Library("aten", "IMPL")
        for key, _ in flaggems_table() or ():
            operator = f"aten::{key}"
            if torch._C._dispatch_has_kernel(operator) and torch._C._dispatch_has_kernel_for_dispatch_key(
                operator, "CompositeImplicitAutograd"
            ):
                name, _, overload = key.partition(".")
                func = getattr(getattr(torch.ops.aten, name), overload or "default")
                self._library.impl(key, func.decompose, self._key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        # Views compute nothing. Composite ones (to, contiguous, reshape) may copy.
        if not isinstance(func, torch._ops.OpOverload) or (func.is_view and not func._can_decompose()):
            return func(*args, **kwargs)
        here, plain = self._look_at(args, kwargs)
        if not plain or not here:
            return func(*args, **kwargs)
        if func.namespace == "aten":
            self._count(func, args, kwargs)
        route = self._routes.get(func)
        if route is None:
            route = self._routes[func] = self._find_route(func)
        if not route:
            return func(*args, **kwargs)
        # Call the kernel that dispatch would pick, with the mode on, so that its own calls are seen.
        with self:
            return func._op_dk(route, *_numbers_as_tensors(func, args), **kwargs)

    def _look_at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, bool]:
        """Whether the call is on the device, and whether all tensors are ordinary ones."""
        here, plain = False, True
        for value in (*args, *kwargs.values()):
            for x in value if isinstance(value, list | tuple) else (value,):
                if isinstance(x, torch.Tensor):
                    here |= x.device.type == self.device_type
                    plain &= type(x) in _PLAIN and x.layout is torch.strided
                elif isinstance(x, torch.SymInt):
                    plain = False
        device = kwargs.get("device")
        if device is not None:
            here |= torch.device(device).type == self.device_type
        return here, plain

    def _find_route(self, func: Any) -> Any:
        """The dispatch key of the kernel that runs below Python's, or False where dispatch must find it."""
        if not any(isinstance(a.type, torch.TensorType) or "Tensor" in str(a.type) for a in func._schema.arguments):
            # A factory function: the backend comes from its device argument.
            keys: tuple[str, ...] = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")
        else:
            keys = (self._key, "CompositeExplicitAutograd", "CompositeImplicitAutograd")
        for key in keys:
            if self._has_kernel(func, key):
                return getattr(torch._C.DispatchKey, key)
        return False

    @staticmethod
    def _has_kernel(func: Any, key: str) -> bool:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func._schema.name.removeprefix("aten::")
        if func._schema.overload_name:
            name += f".{func._schema.overload_name}"
        key = (name, tuple(map(signature, args)), tuple((k, signature(v)) for k, v in kwargs.items()))
        found = self.counts.setdefault(key, {})
        found[self.label] = found.get(self.label, 0) + 1

    def calls(self) -> list[dict[str, Any]]:
        """The counted calls, as {"key", "args", "kwargs", "counts"}."""
        return [
            {"key": name, "args": [as_json(a) for a in args], "kwargs": {k: as_json(v) for k, v in kwargs}, "counts": dict(counts)}
            for (name, args, kwargs), counts in self.counts.items()
        ]


def _numbers_as_tensors(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as Python may pass them: kernels may pass numbers to each other where a tensor is declared.

    For the usual arithmetic PyTorch also accepts a number from Python.
    """
    if torch._C._should_allow_numbers_as_tensors(func._schema.name.removeprefix("aten::")):
        return args
    declared = func._schema.arguments
    return tuple(
        torch.tensor(value) if isinstance(value, bool | int | float) and isinstance(argument.type, torch.TensorType) else value
        for value, argument in zip(args, declared, strict=False)
    )


def signature(value: Any) -> Any:
    """A hashable description of an argument, without its data."""
    if isinstance(value, torch.Tensor):
        return "tensor", tuple(value.shape), value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return "list", tuple(map(signature, value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.layout | torch.memory_format | torch.device):
        return type(value), value  # 1, 1.0 and True are equal
    return "other", type(value).__name__


def as_json(found: Any) -> Any:
    """A signature as JSON; tensors and types are objects with one or more keys."""
    kind, *rest = found
    if kind == "tensor":
        shape, stride, dtype, device = rest
        return {"shape": shape, "stride": stride, "dtype": str(dtype).removeprefix("torch."), "device": device}
    if kind == "list":
        return [as_json(item) for item in rest[0]]
    if kind == "other":
        return {"other": rest[0]}
    value = rest[0]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {kind.__name__: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    return value


def heaviest(calls: Sequence[Mapping[str, Any]], labels: Iterable[str], at_most: int) -> list[Mapping[str, Any]]:
    """The calls of an operator in labelled steps to try: in turn each step's next, those that take longest in it first."""

    def weight(call: Mapping[str, Any], label: str) -> float:
        return -float(call["counts"][label]) * rough_us(nbytes([call["args"], call["kwargs"]]))

    queues = [sorted((call for call in calls if label in call["counts"]), key=lambda call: weight(call, label)) for label in labels]
    chosen = {id(call): call for turn in zip_longest(*queues) for call in turn if call is not None}
    return [*chosen.values()][:at_most]


def telling(calls: Sequence[Mapping[str, Any]], at_most: int) -> list[Mapping[str, Any]]:
    """The calls of an operator to try: the largest, smallest and middle call of each combination of ranks, dtypes and layouts."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for call in calls:
        kinds.setdefault(json.dumps([_kind(call["args"]), _kind(call["kwargs"])]), []).append(call)
    groups = []
    for kind in sorted(kinds, key=lambda k: (-len(kinds[k]), k)):
        ordered = sorted(kinds[kind], key=lambda call: (_numel(call), json.dumps([call["args"], call["kwargs"]])))
        groups.append([ordered[i] for i in dict.fromkeys((len(ordered) - 1, 0, len(ordered) // 2))])
    chosen = [group[turn] for turn in range(3) for group in groups if turn < len(group)]
    return chosen[:at_most]


def _kind(spec: Any) -> Any:
    """The kind of a call: everything but sizes and values."""
    if isinstance(spec, list):
        # A list of numbers is a shape. For a list of tensors the length matters.
        return [_kind(item) for item in spec] if any(isinstance(item, dict | list) for item in spec) else ["values"]
    if isinstance(spec, dict) and "shape" in spec:
        return [len(spec["shape"]), spec["dtype"], spec["device"], is_contiguous(spec["shape"], spec["stride"])]
    if isinstance(spec, dict):
        return {name: _kind(item) for name, item in spec.items()}
    return spec if isinstance(spec, str) else type(spec).__name__


def _tensors(spec: Any) -> list[Mapping[str, Any]]:
    if isinstance(spec, list):
        return [tensor for item in spec for tensor in _tensors(item)]
    if isinstance(spec, dict):
        return [spec] if "shape" in spec else [tensor for item in spec.values() for tensor in _tensors(item)]
    return []


def _numel(call: Mapping[str, Any]) -> int:
    return sum(math.prod(tensor["shape"]) for tensor in _tensors([call["args"], call["kwargs"]]))


def nbytes(spec: Any) -> int:
    """Of the tensors in arguments."""
    return sum(math.prod(tensor["shape"]) * getattr(torch, tensor["dtype"]).itemsize for tensor in _tensors(spec))


def is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for size, step in reversed(list(zip(shape, stride, strict=True))):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def describe(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A call's arguments as text: ``16x1024 bf16, 2.0``."""

    def one(spec: Any) -> str:
        if isinstance(spec, list):
            return f"[{', '.join(map(one, spec))}]"
        if isinstance(spec, dict) and "shape" in spec:
            shape = "x".join(map(str, spec["shape"])) or "scalar"
            layout = "" if is_contiguous(spec["shape"], spec["stride"]) else " strided"
            where = " on the host" if spec["device"] == "cpu" else ""
            return f"{shape} {_SHORT.get(spec['dtype'], spec['dtype'])}{layout}{where}"
        if isinstance(spec, dict):
            return next(iter(map(str, spec.values())))
        return str(spec)

    named = [f"{name}={one(spec)}" for name, spec in kwargs.items() if name not in ("device", "layout", "pin_memory")]
    to_host = kwargs.get("device") == {"device": "cpu"} and any(tensor["device"] != "cpu" for tensor in _tensors([args, kwargs]))
    return ", ".join([*map(one, args), *named, *(["to the host"] if to_host else [])])
