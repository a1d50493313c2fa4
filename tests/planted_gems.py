# SPDX-License-Identifier: Apache-2.0
"""A FlagGems with functions for a CPU, as far as sglang-fl asks it: right ones, and each kind that must not stop a server."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_fl.aten import operators

Function = Callable[..., Any]
#: How often each function was called.
calls: dict[str, int] = {}
#: Stands for the device's state: whether a graph is being captured.
capturing = False
#: Larger batches run without graphs.
largest_graph = 1 << 20
#: How often this graph was replayed since its capture, this time included.
replays = 0


class StreamCaptureUnsupported(RuntimeError):
    """What a device raises for a call that it does not capture."""


def _named(name: str, function: Function) -> Function:
    def called(*args: Any, **kwargs: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        return function(*args, **kwargs)

    called.__name__ = name
    called.__module__, called.__qualname__ = function.__module__, function.__qualname__
    return called


def mul(self: torch.Tensor, other: Any) -> torch.Tensor:
    """Right, by way of another operator."""
    dtype = torch.result_type(self, other)
    other = other if isinstance(other, torch.Tensor) else torch.scalar_tensor(other)
    return torch.addcmul(torch.zeros((), dtype=dtype), self.to(dtype), other.to(dtype))


def silu(self: torch.Tensor) -> torch.Tensor:
    return self / (1 + torch.exp(-self))


def _raises(*args: Any, **kwargs: Any) -> Any:
    raise TypeError("CompilationError at 12:8: no such type")


def _exits(*args: Any, **kwargs: Any) -> Any:
    sys.exit("no licence")


def _is_missing(*args: Any) -> Any:
    raise AttributeError("module 'triton.language' has no attribute 'silu'")


def _in_capture(what: str) -> Function:
    def function(self: torch.Tensor) -> torch.Tensor:
        if capturing:
            raise StreamCaptureUnsupported(f"operation not permitted when stream is capturing: {what}")
        return silu(self)

    return function


def _other_dtype(self: torch.Tensor, *args: Any) -> torch.Tensor:
    return silu(self.double())


def _hangs(*args: Any) -> Any:
    time.sleep(3600)


def _crashes(*args: Any) -> Any:
    ctypes.string_at(0)


def _is_killed(*args: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


#: What silu may be, and what else a kind of failure needs.
KINDS: Mapping[str, Function] = {
    "right": silu,
    "raises at compile": _raises,
    "exits": _exits,
    "missing": _is_missing,
    "synchronises in capture": _in_capture("cudaStreamSynchronize"),
    "allocates on the host": _in_capture("cudaHostAlloc"),
    "another dtype": _other_dtype,
    "hangs": _hangs,
    "crashes": _crashes,
    "is killed": _is_killed,
}


def gems(silu_is: Function = silu, **more: tuple[str, Function]) -> SimpleNamespace:
    """The module. ``more``: function -> (ATen operator, function)."""
    config = {"mul": [("mul.Tensor", _named("mul", mul))], "silu": [("silu", _named("silu", silu_is))]}
    config |= {name: [(key, _named(name, function))] for name, (key, function) in more.items()}

    class Registrar:
        """FlagGems's own."""

        reg_key = "CPU"
        cpp_patched_ops: frozenset[str] = frozenset()

        def __init__(self, names: list[str]):
            self.lib: torch.library.Library | None = None
            for name in names:
                for key, function in config[name]:
                    self.register_impl(key, function)

        def register_impl(self, key: str, fn: Function) -> None:
            assert self.lib is not None
            self.lib.impl(key, fn, self.reg_key)

        def get_unused_ops(self) -> list[str]:
            return []

    module = SimpleNamespace(FULL_CONFIG_BY_FUNC=config, registrar=Registrar, vendor_name="planted")

    def only_enable(lib: Any, include: list[str], registrar: type[Registrar]) -> None:
        module.current_work_registrar = registrar([name for name in include if name in config])

    def enable(lib: Any, unused: list[str], registrar: type[Registrar]) -> None:
        module.current_work_registrar = registrar([name for name in config if name not in unused])

    module.only_enable, module.enable = only_enable, enable
    return module


@contextmanager
def in_place_of_flaggems(module: SimpleNamespace) -> Iterator[None]:
    """For all that enable a set of ATen operators."""
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "load", lambda: module)
        yield
