# SPDX-License-Identifier: Apache-2.0
"""The first calls of FlagGems's functions, on the arguments that the model gives them.

During trials a thin wrapper of FlagGems's function is registered with the dispatcher. It calls PyTorch's own kernel instead where
FlagGems's function fails, and between a graph's segments, whose Python runs at every replay. PyTorch's kernel is a handle that was
taken before anything was replaced. Some of these kernels call other operators; while one runs, all calls of this thread go to PyTorch.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..dispatch.manager import is_capturing
from ..trial import current_guard
from ..trial.graph import capture_and_discard
from ..utils.dispatcher import why_no_handles
from .native import is_written, schema_of

logger = logging.getLogger("sglang_fl.aten")

Function = Callable[..., Any]


class _Thread(threading.local):
    native = 0


class Trials:
    """The results of the first calls of a set's functions in this process.

    Args:
        captures_graphs: each function is also captured into a graph that is discarded.
    """

    def __init__(self, captures_graphs: bool = False):
        self.captures_graphs = captures_graphs
        #: ATen operators whose first call on FlagGems went well.
        self.passed: set[str] = set()
        #: FlagGems function -> what happened. Their calls go to PyTorch.
        self.failures: dict[str, str] = {}
        #: Whether SGLang captures a graph just now: what runs between its segments is PyTorch's then.
        self.in_capture = False
        #: Whether the model runs on dummy data, so that a half-finished call may be repeated.
        self.on_scratch_data = False
        #: Told of an operator that PyTorch's kernel has taken over in a later call, and what happened.
        self.gave_way: Callable[[str, str], object] = lambda *_: None
        self._thread = _Thread()

    @contextlib.contextmanager
    def native(self) -> Iterator[None]:
        """Have all calls of this thread go to PyTorch's own kernels."""
        self._thread.native += 1
        try:
            yield
        finally:
            self._thread.native -= 1

    def tried(self, function: str, key: str, fn: Function, kernel: Function | None) -> Function:
        """The wrapper of ``fn`` during trials.

        Args:
            kernel: PyTorch's own; None where this PyTorch cannot keep it callable. Then what fails raises.
        """
        native = fn if kernel is None else self._natively(kernel)
        writes = _writes(key)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._thread.native or function in self.failures or (self.in_capture and not is_capturing()):
                return native(*args, **kwargs)
            may_repeat = not writes or self.on_scratch_data
            try:
                if key not in self.passed and not is_capturing():
                    with current_guard().running(function):
                        self._try(key, fn, kernel, args, kwargs)
                    self.passed.add(key)
                return fn(*args, **kwargs)
            except Exception as error:
                may_repeat |= key not in self.passed  # its trial failed, on copies
                if kernel is None or not may_repeat or is_capturing() or _is_lost():
                    self._fail(function, key, error, takes_its_place=kernel is not None)
                    raise
                result = native(*args, **kwargs)  # raises where the call itself is wrong
                self._fail(function, key, error)
                return result

        return call

    def served(self, function: str, key: str, fn: Function, kernel: Function | None, *, strict: bool = False) -> Function:
        """What is called from Python once the first call went well.

        A call that fails goes to PyTorch's own kernel, and so do all after it. A call that writes its arguments cannot be repeated, nor
        one that PyTorch has no kernel for: the next start excludes the function. Under ``strict`` an error goes up.
        """
        own = None if kernel is None else self._natively(kernel)
        native = None if _writes(key) else own
        called = fn

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            if self._thread.native and own is not None:
                return own(*args, **kwargs)
            try:
                return called(*args, **kwargs)
            except Exception as error:
                if strict or called is native or isinstance(error, torch.OutOfMemoryError) or is_capturing() or hasattr(error, "_accuses"):
                    raise
                what = f"failed in a later call of aten::{key}: {_first_line(error)}"
                if native is None or _is_lost():
                    error._accuses = function  # type: ignore[attr-defined]
                    current_guard().ends_the_process(function, what)
                    raise
                result = native(*args, **kwargs)  # raises where the call itself is wrong
                called = native
            logger.warning("ATen operators: %s %s; using PyTorch's own kernel", function, what)
            self.gave_way(key, what)
            return result

        return call

    def _natively(self, kernel: Function) -> Function:
        def native(*args: Any, **kwargs: Any) -> Any:
            with self.native():
                return kernel(*args, **kwargs)

        return native

    def _try(self, key: str, fn: Function, kernel: Function | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Try a function on copies of what it writes; raises what is wrong with it."""
        expected: Any = None
        if kernel is not None:
            copied, named = self._copies(key, args, kwargs)
            with self.native(), contextlib.suppress(Exception):  # a chip's PyTorch may lack the operator
                expected = kernel(*copied, **named)
        copied, named = self._copies(key, args, kwargs)
        result = fn(*copied, **named)
        device = next((leaf.device for leaf in pytree.tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)), None)
        if device is not None:
            torch.get_device_module(device).synchronize()
        if expected is not None:
            _compare(result, expected)
        if self.captures_graphs and device is not None:
            capture_and_discard(lambda: fn(*copied, **named), device)

    def _copies(self, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, with copies of those that the operator writes."""
        arguments = schema_of(key).arguments
        names, written = [argument.name for argument in arguments], {argument.name for argument in arguments if is_written(argument)}

        def copy(value: Any) -> Any:
            return pytree.tree_map_only(torch.Tensor, torch.clone, value)

        with self.native():
            copied = [copy(value) if name in written else value for name, value in zip(names, args, strict=False)]
            return copied, {name: copy(value) if name in written else value for name, value in kwargs.items()}

    def _fail(self, function: str, key: str, error: Exception, *, takes_its_place: bool = True) -> None:
        """Write down a failure; an error that goes up through several functions is the innermost's.

        Args:
            takes_its_place: whether PyTorch's own kernel can be called instead.
        """
        if function in self.failures or hasattr(error, "_accuses"):
            return
        error._accuses = function  # type: ignore[attr-defined]
        where = "could not be captured" if is_capturing() else "failed its trial"
        self.failures[function] = f"{where} on aten::{key}: {_first_line(error)}"
        if _is_lost():
            current_guard().ends_the_process(function, f"{self.failures[function]}; the device is unusable after it")
        elif not takes_its_place and not is_capturing():
            current_guard().ends_the_process(function, f"{self.failures[function]}, and {_why_no_kernel()}")


def _compare(result: Any, expected: Any) -> None:
    """Raises TypeError unless a result is of PyTorch's own result's shape, dtype and device."""
    ours, own = pytree.tree_leaves(result), pytree.tree_leaves(expected)
    if len(ours) != len(own):
        raise TypeError(f"its result has {len(ours)} parts, not {len(own)}")
    for found, wanted in zip(ours, own, strict=True):
        if isinstance(wanted, torch.Tensor) and not isinstance(found, torch.Tensor):
            raise TypeError(f"its result is {type(found).__name__}, not a tensor")
        if isinstance(wanted, torch.Tensor) and _about(found) != _about(wanted):
            raise TypeError(f"its result is {_about(found)}, not {_about(wanted)}")


def _writes(key: str) -> bool:
    return any(is_written(argument) for argument in schema_of(key).arguments)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _why_no_kernel() -> str:
    if (why := why_no_handles()) is None:
        return "PyTorch has no kernel of its own for it on this device"
    return f"{why}, so its own kernel cannot take the call"


def _about(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def _is_lost() -> bool:
    """Whether the device is in a sticky error state: no further call of this process succeeds."""
    if not torch.accelerator.is_available() or is_capturing():
        return False
    try:
        torch.accelerator.synchronize()
        torch.accelerator.synchronize()
    except Exception:
        return True
    return False
