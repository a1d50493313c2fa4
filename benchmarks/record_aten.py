# SPDX-License-Identifier: Apache-2.0
"""A plugin module that records every ATen call of a served model, as FlagGems would meet it.

Named in SGLANG_FL_PLUGIN_MODULES (``aten.py record`` does it). In a process that runs a model, once the
model is loaded, each ATen call on the accelerator is counted by name and arguments, apart by whether a
graph was being captured. Calls that an operator makes inside itself are seen too: an operator registered
in FlagGems's place is met by them as well.

Settings (not in sglang-fl's table, since they are this file's own):
    BENCH_ATEN_FILE    the JSON file to write, replaced every second while there is something new
    BENCH_ATEN_DEVICE  the device type to record; default cuda
    BENCH_ATEN_INNER   0: leave out the calls that operators make inside themselves
"""

import ast
import atexit
import importlib.util
import json
import logging
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sglang_fl.bind

logger = logging.getLogger("sglang_fl.benchmarks")

DISPATCH_KEYS = {"cuda": "CUDA", "cpu": "CPU"}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_WRITE_EVERY_SECONDS = 1.0


def register_builtins(registry: Any) -> None:
    """Registers nothing: arranges that recording starts when a model's layers are bound."""
    path = os.environ.get("BENCH_ATEN_FILE")
    if not path:
        raise ValueError("record_aten needs a file to write: set BENCH_ATEN_FILE")
    recorder = Recorder(Path(path), os.environ.get("BENCH_ATEN_DEVICE", "cuda"))
    bind_model = sglang_fl.bind.bind_model

    def bind_and_record(*args: Any) -> Any:
        report = bind_model(*args)
        recorder.start()
        return report

    sglang_fl.bind.bind_model = bind_and_record
    # Plugin modules may be loaded by the first call of bind_model itself.
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is bind_model.__code__:
            recorder.start()
            return
        frame = frame.f_back


class Recorder(TorchDispatchMode):
    """Counts the ATen calls of the thread that started it, and writes the counts to a file."""

    #: Else a higher-order operator under the mode is an error.
    supports_higher_order_operators = True

    def __init__(self, path: Path, device_type: str):
        super().__init__()
        self.path, self.device_type = path, device_type
        self.counts: dict[tuple[Any, ...], list[int]] = {}
        self._key = DISPATCH_KEYS[device_type]
        self._routes: dict[Any, Any] = {}
        self._inner = os.environ.get("BENCH_ATEN_INNER", "1") != "0"
        self._library: torch.library.Library | None = None
        self._started = False
        self._changed = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled, and only what they call at run time is seen."""
        return True

    def start(self) -> None:
        """Record from now on, in this thread."""
        if self._started:  # a draft model is bound after the model
            return
        self._started = True
        # A file that can be opened says at once what is wrong with the path.
        self.write()
        atexit.register(self.write)
        threading.Thread(target=self._write_now_and_then, name="record_aten", daemon=True).start()
        self._keep_composites_whole()
        self.__enter__()
        logger.info("recording ATen calls on %s to %s", self.device_type, self.path)

    def _keep_composites_whole(self) -> None:
        """Give operators that PyTorch takes apart early a kernel of their own, which does just that.

        FlagGems registers some of them (``pad``, ``true_divide``), and PyTorch then calls FlagGems instead of taking them
        apart; without a kernel they would be apart before a mode sees them.
        """
        self._library = torch.library.Library("aten", "IMPL")
        for key in flaggems_operators():
            operator = f"aten::{key}"
            if torch._C._dispatch_has_kernel(operator) and torch._C._dispatch_has_kernel_for_dispatch_key(
                operator, "CompositeImplicitAutograd"
            ):
                name, _, overload = key.partition(".")
                func = getattr(getattr(torch.ops.aten, name), overload or "default")
                self._library.impl(key, func.decompose, self._key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        # Views compute nothing; those made of other operators (to, contiguous, reshape) may be none.
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
        # Straight to the kernel that dispatch would pick, with the mode on: its own calls are seen.
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
        if not self._inner:
            return (
                torch._C.DispatchKey.CompositeImplicitAutograd if func._can_decompose() and not self._has_kernel(func, self._key) else False
            )
        if not any(isinstance(a.type, torch.TensorType) or "Tensor" in str(a.type) for a in func._schema.arguments):
            # A factory: which backend it is comes from its device argument.
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
        capturing = self.device_type == "cuda" and torch.cuda.is_current_stream_capturing()
        key = (name, tuple(map(signature, args)), tuple((k, signature(v)) for k, v in kwargs.items()))
        self.counts.setdefault(key, [0, 0])[capturing] += 1
        self._changed = True

    def _write_now_and_then(self) -> None:
        while True:
            time.sleep(_WRITE_EVERY_SECONDS)
            if self._changed:
                self.write()

    def write(self) -> None:
        """The counts so far, as {"key", "args", "kwargs", "eager", "captured"}."""
        self._changed = False
        calls = [
            {
                "key": name,
                "args": [as_json(a) for a in args],
                "kwargs": {k: as_json(v) for k, v in kwargs},
                "eager": eager,
                "captured": captured,
            }
            for (name, args, kwargs), (eager, captured) in self.counts.copy().items()
        ]
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(calls), encoding="utf-8")
        scratch.replace(self.path)


def _numbers_as_tensors(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as Python may pass them: kernels may give each other numbers where a tensor is declared.

    For the usual arithmetic PyTorch takes a number from Python too.
    """
    if torch._C._should_allow_numbers_as_tensors(func._schema.name.removeprefix("aten::")):
        return args
    declared = func._schema.arguments
    return tuple(
        torch.tensor(value) if isinstance(value, bool | int | float) and isinstance(argument.type, torch.TensorType) else value
        for value, argument in zip(args, declared, strict=False)
    )


def flaggems_operators() -> list[str]:
    """The ATen operators that FlagGems has functions for, from its source."""
    spec = importlib.util.find_spec("flag_gems")
    if spec is None or spec.origin is None:
        return []
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    config = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "_FULL_CONFIG" for t in node.targets)
    )
    return [
        row.elts[0].value for row in ast.walk(config) if isinstance(row, ast.Tuple) and row.elts and isinstance(row.elts[0], ast.Constant)
    ]


def signature(value: Any) -> Any:
    """What stays of an argument: hashable, and without the argument's data."""
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
