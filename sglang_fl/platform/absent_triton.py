# SPDX-License-Identifier: Apache-2.0
"""What SGLang's modules need of Triton to be imported where there is none. A kernel says at its launch what it takes to replace it."""

import functools
from collections.abc import Callable
from typing import Any


class NoTriton(NotImplementedError):
    """SGLang came to a kernel of Triton's, and there is none for this chip."""


class AbsentKernel:
    """A function that ``triton.jit`` decorates."""

    def __init__(self, fn: Callable[..., Any]):
        functools.update_wrapper(self, fn)
        self.fn = fn
        self._target = f"{fn.__module__}:{fn.__qualname__}"

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return self.run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NoTriton(
            f"SGLang launched its Triton kernel {self._target}, and there is no Triton for this chip: have the chip's package replace it, "
            f"VendorPlatform(sglang_kernels={{{self._target!r}: 'package.module:function'}}), or serve without what needs it "
            "(docs/vendors.md)"
        )

    warmup = run


def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``triton.jit``, with and without options."""
    return AbsentKernel if fn is None else AbsentKernel(fn)


def _unchanged(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    """A decorator that leaves a kernel as it is, whatever its arguments."""
    return lambda kernel: kernel


class constexpr:  # Triton's name
    """``triton.language.constexpr``: an annotation, and a value that is known at compile time."""

    def __init__(self, value: Any):
        self.value = getattr(value, "value", value)


class Config:
    """``triton.Config``: one choice of an autotuned kernel."""

    def __init__(self, kwargs: dict[str, Any], **options: Any):
        self.kwargs = kwargs
        self.__dict__.update(options)


def cdiv(x: int, y: int) -> int:
    """For the grid of a launch, which is worked out before a replacement is called."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(n - 1, 0).bit_length()


PRESENT: dict[str, Any] = {
    "triton.__version__": "0.0.0",
    "triton.jit": jit,
    "triton.runtime.jit.JITFunction": AbsentKernel,
    "triton.JITFunction": AbsentKernel,
    "triton.experimental.gluon.jit": jit,
    "triton.constexpr_function": lambda fn: fn,
    "triton.autotune": _unchanged,
    "triton.heuristics": _unchanged,
    "triton.Config": Config,
    "triton.cdiv": cdiv,
    "triton.next_power_of_2": next_power_of_2,
    "triton.language.constexpr": constexpr,
}
