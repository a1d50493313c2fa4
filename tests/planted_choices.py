# SPDX-License-Identifier: Apache-2.0
"""Implementations and FlagGems functions of each kind that ``sglang-fl tune`` must tell apart, on a CPU whose own SiluAndMul is slow.

Loaded through SGLANG_FL_PLUGIN_MODULES. Differences in speed are pauses, far beyond what a busy machine makes of them.
"""

import ctypes
import itertools
import sys
import time
from typing import Any

import graphs_on_cpu
import planted_gems
import torch

from sglang_fl.aten import layer, operators
from sglang_fl.check import graphs
from sglang_fl.dispatch import BackendImplKind, OpImpl, OpRegistry
from sglang_fl.dispatch.backends.reference.impl import activation

#: Of SGLang's own SiluAndMul here, in seconds.
PAUSE = 0.004


def _right(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate.float()).mul(up.float()).to(x.dtype)


def right_and_faster(obj: Any, x: torch.Tensor) -> torch.Tensor:
    time.sleep(PAUSE / 8)  # so that what is slower served promises more
    return _right(x)


def right_and_slower(obj: Any, x: torch.Tensor) -> torch.Tensor:
    time.sleep(2 * PAUSE)
    return _right(x)


def a_tie(obj: Any, x: torch.Tensor) -> torch.Tensor:
    time.sleep(PAUSE)
    return _right(x)


def faster_and_wrong(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return _right(x) * 1.001


class SlowerServed:
    """Keeps something for the layer that it ran last, and prepares it anew for another one: as fast as can be in a loop."""

    def __init__(self) -> None:
        self._last: Any = None

    def __call__(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        if obj is not self._last:
            time.sleep(15 * PAUSE)
            self._last = obj
        return _right(x)


_turns = itertools.count()


def not_deterministic(obj: Any, x: torch.Tensor) -> torch.Tensor:
    """Right each time, and rounded in another way every other time."""
    gate, up = x.double().chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    return torch.nextafter(exact.to(x.dtype), torch.zeros((), dtype=x.dtype)) if next(_turns) % 2 else exact.to(x.dtype)


def crashing(obj: Any, x: torch.Tensor) -> torch.Tensor:
    ctypes.string_at(0)
    raise AssertionError


def capture_unsafe(obj: Any, x: torch.Tensor) -> torch.Tensor:
    """Asks the device for a number, which a capture forbids."""
    float(x.flatten()[0])
    return _right(x)


def slow_rsqrt(self: torch.Tensor) -> torch.Tensor:
    time.sleep(PAUSE)
    return 1 / torch.sqrt(self)


KINDS = {
    "right_and_faster": right_and_faster,
    "right_and_slower": right_and_slower,
    "a_tie": a_tie,
    "faster_and_wrong": faster_and_wrong,
    "slower_served": SlowerServed(),
    "not_deterministic": not_deterministic,
    "capture_unsafe": capture_unsafe,
    "crashing": crashing,
}


class Graph(graphs_on_cpu.Graph):
    """While it is captured, no number can be read."""

    def __torch_dispatch__(self, func: Any, *args: Any) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise planted_gems.StreamCaptureUnsupported("operation not permitted when stream is capturing")
        return super().__torch_dispatch__(func, *args)


def register_builtins(registry: OpRegistry) -> None:
    for name, function in KINDS.items():
        registry.register_impl(OpImpl("silu_and_mul", f"vendor.{name}", BackendImplKind.VENDOR, function, vendor="planted"))
    # So that this package's reference is faster than what is served by default, and not the fastest.
    own_reference = activation.silu_and_mul
    activation.silu_and_mul = lambda obj, x: (time.sleep(PAUSE / 2), own_reference(obj, x))[1]
    gems = planted_gems.gems(lambda self: self, rsqrt=("rsqrt", slow_rsqrt))  # a silu that computes nothing
    operators.load = lambda: gems
    layer.why_not_here = lambda device: None
    checking: Any = sys.modules.get("sglang_fl.tune.recorded")
    if checking is not None:  # the process that checks has a device with graphs
        checking.graphs_of = graphs.graphs_of = lambda device: (Graph, graphs_on_cpu.capture)
    layers = sys.modules.get("sglang.srt.layers.activation")
    if layers is not None:
        own = layers.SiluAndMul.forward_native

        def slow(self: Any, x: torch.Tensor) -> torch.Tensor:
            time.sleep(PAUSE)
            return own(self, x)

        layers.SiluAndMul.forward_native = slow
