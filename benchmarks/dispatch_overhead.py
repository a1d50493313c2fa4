#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a bound layer costs per call, against SGLang's own dispatch of the same function.

Both sides are SGLang's real layer objects, called as a model calls them, and both end in the same
Python function, which does nothing: what is left is dispatch. Rounds alternate (A B B A), so that what
else the machine does falls on both sides; the ratio is the median of the rounds' ratios, with a bootstrap interval.

    python benchmarks/dispatch_overhead.py            # prints a table
    python benchmarks/dispatch_overhead.py --json     # and the data
"""

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from torch import nn

from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.dispatch.manager import OpManager
from sglang_fl.dispatch.policy import SelectionPolicy, set_global_policy
from sglang_fl.dispatch.registry import OpRegistry
from sglang_fl.dispatch.types import BackendImplKind, OpImpl
from sglang_fl.tune.timing import Candidate, compare

#: Each takes both, one right after the other.
ROUNDS = 120

#: What the binder's trial of silu_and_mul expects of an implementation: [2, 256] -> [2, 128].
GATE_AND_UP, ACTIVATED = torch.zeros(2, 256), torch.zeros(2, 128)


def nothing_silu_and_mul(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return ACTIVATED


def nothing_rms_norm(layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    return (x, residual) if residual is not None else x


def nothing_rotary_embedding(layer: Any, query: torch.Tensor, key: torch.Tensor, *_: Any) -> Any:
    return query, key


def as_sglang_forward(function: Callable[..., Any], op: str) -> Callable[..., Any]:
    """The function as a forward that SGLang dispatches to.

    A rotary embedding's arguments must be brought into the operator's shape on either side; here
    the way SGLang's own ``forward_native`` does it.
    """
    if op != "rotary_embedding":
        return function

    def forward_rotary(
        self: Any,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        offsets: torch.Tensor | None = None,
        fused_set_kv_buffer_arg: Any = None,
    ) -> Any:
        positions = positions.flatten()
        cos, sin = self.cos_sin_cache.chunk(2, dim=-1)
        q = query.reshape(positions.shape[0], -1, self.head_size)
        k = key.reshape(positions.shape[0], -1, self.head_size)
        q, k = function(self, q, k, cos, sin, positions, not self.is_neox_style, True)
        return q.reshape(query.shape), k.reshape(key.shape)

    return forward_rotary


class Holder(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


def measure(native: nn.Module, bound: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Medians, their difference and ratio."""
    layers = {"native": native, "bound": bound}
    found = compare({name: Candidate([partial(layer, *inputs)]) for name, layer in layers.items()}, torch.device("cpu"), ROUNDS)
    native_us, bound_us = (found[name].us for name in layers)
    assert native_us is not None and bound_us is not None, found
    row = {"sglang_ns": 1000 * native_us, "sglang_fl_ns": 1000 * bound_us, "added_ns": 1000 * (bound_us - native_us)}
    return row | {"ratio": found["bound"].ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    registry = OpRegistry()
    functions = {"silu_and_mul": nothing_silu_and_mul, "rms_norm": nothing_rms_norm, "rotary_embedding": nothing_rotary_embedding}
    registry.register_many(OpImpl(op, "default.flagos", BackendImplKind.DEFAULT, fn) for op, fn in functions.items())
    set_global_policy(SelectionPolicy())
    binder = Binder(OpManager(registry))

    x, positions = torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64)
    cases = {
        "silu_and_mul": (SiluAndMul, (), (GATE_AND_UP,)),
        "rms_norm": (RMSNorm, (64,), (x,)),
        "rms_norm, residual": (RMSNorm, (64,), (x, x.clone())),
        "rotary_embedding": (RotaryEmbedding, (64, 64, 128, 10000, True, torch.float32), (positions, x, x.clone())),
    }
    rows = []
    for name, (cls, arguments, inputs) in cases.items():
        op = name.split(",")[0]
        native, bound = cls(*arguments), cls(*arguments)
        native._forward_method = MethodType(as_sglang_forward(functions[op], op), native)
        report = binder.bind(Holder(bound), Load())
        assert report.bound == 1, report.summary()
        rows.append({"case": name} | measure(native, bound, inputs))

    table = Table(
        title=f"A call, on {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}", title_justify="left"
    )
    for column in ("layer", "SGLang's dispatch, ns", "bound by sglang-fl, ns", "added, ns", "ratio [95 %]"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in rows:
        ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*row["ratio"])
        table.add_row(row["case"], f"{row['sglang_ns']:.0f}", f"{row['sglang_fl_ns']:.0f}", f"{row['added_ns']:+.0f}", ratio)
    Console().print(table)
    if args.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
