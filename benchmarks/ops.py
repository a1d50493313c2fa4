#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every implementation of every operator against SGLang's own, at the shapes of serving.

Both sides are SGLang's real layers (op_forms/), called as a model calls them: one left to SGLang, the others bound by
sglang-fl to one implementation each. On CUDA the calls are captured into graphs, as serving does.

    python benchmarks/ops.py                                              # prints a table
    python benchmarks/ops.py --out benchmarks/results/ops-nvidia-h100.json   # and keeps the data
    python benchmarks/ops.py --quick --tokens 16 --hidden 256             # other shapes
    python benchmarks/ops.py --op fused_moe --kind flagos vendor          # without the reference, which is slow at large shapes

A row's ``ratio`` and ``host_ratio`` are (median, low, high) of its time over that of SGLang's layer, with a
95 % interval; ``bandwidth_share`` is what it moves at least (each input read once, each output written
once) over its time, as a share of what a large copy reaches.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import result_file
import torch
from op_forms import FORMS, Form, Tensors
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from sglang_fl.dispatch import SelectionPolicy, get_default_manager, set_global_policy
from sglang_fl.dispatch.bridge.binder import Binder
from sglang_fl.dispatch.bridge.socket import Load
from sglang_fl.dispatch.manager import OpManager
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.dispatch.registry import OpRegistry
from sglang_fl.dispatch.types import BackendImplKind, OpImpl
from sglang_fl.tune.timing import ROUNDS, Candidate, CaptureStateLost, Timing, compare, copy_bandwidth, first_error, input_sets

SGLANG = "sglang"
_KINDS = tuple(kind.value for kind in BackendImplKind)
TOKENS, HIDDEN = (1, 16, 64, 512, 2048, 8192), (1024, 2048, 4096, 8192)
QUICK_TOKENS, QUICK_HIDDEN, QUICK_ROUNDS = (1, 64, 2048), (1024, 4096), 9
#: SGLang's own is not always exact to a few roundings of fp32: FlashInfer's routing by groups was off by 4.5e-6 of the
#: largest weight on an H100.
_SGLANG_IN_FP32 = 1e-5


class Model(nn.Module):
    """As much of a model as the binder looks at to know a layer's sizes, dtype and device.

    Most of a model's weights are of its dtype, also where this layer's are not.
    """

    def __init__(self, layer: nn.Module, form: Form, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.layer = layer
        most = 1 + sum(parameter.numel() for parameter in layer.parameters())
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype, device=device).expand(most), requires_grad=False)
        if form.intermediate_size is not None:
            self.gate_up_proj = SimpleNamespace(output_size_per_partition=2 * form.intermediate_size)


def bound_layer(impl: OpImpl, form: Form, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A new layer, bound to the implementation. Raises what its trial does, or RuntimeError if it fails it."""
    if form.bound is not None:
        return form.bound(impl)
    registry = OpRegistry()
    registry.register_impl(impl)
    layer = form.layer().to(device)
    report = Binder(OpManager(registry)).bind(Model(layer, form, dtype, device), Load())
    if report.bound != 1:
        raise RuntimeError(f"{impl.impl_id} was not bound: {report.summary()}")
    return layer


def disagreement(result: Tensors, expected: Tensors) -> str | None:
    """How a layer's result differs from that of SGLang's layer by more than rounding, or None.

    A coarse check, against mixed-up arguments; the tests compare with float64.
    """
    for i, (x, y) in enumerate(zip(result, expected, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"result {i} is {tuple(x.shape)} {x.dtype}, SGLang's is {tuple(y.shape)} {y.dtype}"
        error = (x.float() - y.float()).abs().max().item()
        allowed = max(4 * torch.finfo(y.dtype).eps, _SGLANG_IN_FP32) * y.float().abs().max().item()
        if not error <= allowed:
            return f"result {i} differs from SGLang's by {error:.3g}; rounding explains {allowed:.3g}"
    return None


def _copies(tensors: Tensors) -> Tensors:
    """Copies with the layout of the originals."""
    return tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for x in tensors)


def measure(form: Form, tokens: int, impls: Sequence[OpImpl], rounds: int, device: torch.device) -> tuple[int, dict[str, Timing]]:
    """The bytes that must be moved, and timings by implementation id, that of SGLang's own layer first."""
    with form.within():
        first = form.inputs(tokens)
        dtype = next(x.dtype for x in first if x.is_floating_point())
        moved = form.moved(first)
        inputs = [first, *(form.inputs(tokens) for _ in range(input_sets(moved, device) - 1))]
        own = form.layer().to(device)
        given = _copies(first)
        expected = form.compared(own(*given))
        candidates = {SGLANG: Candidate([partial(own, *tensors) for tensors in inputs])}
        errors: dict[str, str] = {}
        for impl in impls:
            try:
                layer = bound_layer(impl, form, dtype, device)
                why = disagreement(form.compared(layer(*_copies(first))), expected)
            except Exception as error:
                why = first_error(error)
            if why is None:
                candidates[impl.impl_id] = Candidate([partial(layer, *tensors) for tensors in inputs])
            else:
                errors[impl.impl_id] = why
        return moved, compare(candidates, device, rounds) | {impl_id: Timing(error=why) for impl_id, why in errors.items()}


def rows_of(
    op: str,
    form: Form,
    hidden: int,
    tokens: int,
    impls: Sequence[OpImpl],
    timings: Mapping[str, Timing],
    bandwidth: float,
    moved: int | None,
) -> Iterator[dict[str, Any]]:
    kinds = {SGLANG: SGLANG} | {impl.impl_id: impl.kind.value for impl in impls}
    for impl_id, timing in timings.items():
        yield {
            "op": op,
            "variant": form.variant or None,
            "hidden": hidden,
            "tokens": tokens,
            "impl": impl_id,
            "kind": kinds[impl_id],
            "bytes": moved,
            "bandwidth_share": moved / (timing.us * 1e-6) / bandwidth if moved and timing.us else None,
            **asdict(replace(timing, ratio=None, host_ratio=None) if impl_id == SGLANG else timing),
        }


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """For each operator and form: the fastest in each place, and every ratio to SGLang's time."""
    for op, variant in dict.fromkeys((row["op"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["variant"]) == (op, variant)]
        tokens = sorted({row["tokens"] for row in mine})
        table = Table(title=f"{op}{f', {variant}' if variant else ''}: SGLang's µs, and each one's time over it", title_justify="left")
        table.add_column("hidden")
        for count in tokens:
            table.add_column(f"{count} token{'s' if count > 1 else ''}", justify="right")
        for hidden in sorted({row["hidden"] for row in mine}):
            cells = [[row for row in mine if (row["hidden"], row["tokens"]) == (hidden, count)] for count in tokens]
            table.add_row(str(hidden), *map(_cell, cells), end_section=True)
        yield table


def _cell(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    # SGLang's own wins unless one of the others is faster beyond what the measurement can tell.
    faster = [row for row in rows if row["ratio"] and row["ratio"][2] < 1]
    best = min(faster, key=lambda row: row["ratio"][0])["impl"] if faster else SGLANG
    for row in rows:
        if row["error"] or row["us"] is None:
            text = f"{row['impl']} failed"
        elif row["ratio"]:
            text = f"{row['impl']} {row['ratio'][0]:.2f}"
        else:
            text = f"{row['impl']} {row['us']:.3g}"
        lines.append(f"[bold green]{text}[/]" if row["impl"] == best else text)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the rows here, as they come")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--op", nargs="+", choices=tuple(FORMS), default=list(FORMS), help="only these operators")
    parser.add_argument("--kind", nargs="+", choices=_KINDS, default=list(_KINDS), help="only implementations of these kinds")
    parser.add_argument("--tokens", nargs="+", type=int, help="numbers of tokens")
    parser.add_argument("--hidden", nargs="+", type=int, help="hidden sizes, multiples of 128")
    args = parser.parse_args()
    dtype: torch.dtype = getattr(torch, args.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    hidden_sizes = args.hidden or (QUICK_HIDDEN if args.quick else HIDDEN)
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    console = Console(width=None if sys.stdout.isatty() else 160)

    set_global_policy(SelectionPolicy(strict=True))  # a failed trial is an error, and no other implementation takes over
    manager = get_default_manager()
    manager.ensure_initialized()
    impls: dict[str, list[OpImpl]] = {}
    unavailable: dict[str, dict[str, str]] = {}
    for op in args.op:
        found = sorted(manager.registry.get_implementations(op), key=lambda impl: (-impl.priority, impl.impl_id))
        found = [impl for impl in found if impl.kind.value in args.kind]
        why = {impl.impl_id: impl.why_unavailable() for impl in found}
        impls[op] = [impl for impl in found if why[impl.impl_id] is None]
        unavailable[op] = {impl_id: reason for impl_id, reason in why.items() if reason is not None}
    for op in sorted(set(OPERATORS) - set(FORMS)):
        console.print(f"{op} is not measured: it has no forms in benchmarks/op_forms")

    torch.manual_seed(0)
    with torch.inference_mode():
        bandwidth = copy_bandwidth(device)
        head = result_file.header(dtype=args.dtype, copy_bytes_per_second=bandwidth, unavailable=unavailable)
        cases = [
            (op, form, hidden, count)
            for op in args.op
            for hidden in hidden_sizes
            for form in FORMS[op](hidden, dtype, device)
            for count in tokens
            if form.most_tokens is None or count <= form.most_tokens
        ]
        rows: list[dict[str, Any]] = []
        columns = (TextColumn("{task.description:<40}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=len(cases))
            for op, form, hidden, count in cases:
                progress.update(task, description=f"{op} {form.variant} {count}x{hidden}")
                try:
                    moved, timings = measure(form, count, impls[op], rounds, device)
                except CaptureStateLost:
                    raise
                except Exception as error:  # SGLang's own layer, or the inputs: there is nothing to compare with
                    moved, timings = None, {SGLANG: Timing(error=first_error(error))}
                rows += rows_of(op, form, hidden, count, impls[op], timings, bandwidth, moved)
                if args.out is not None:
                    result_file.write(args.out, head, rows)
                progress.advance(task)

    where = head["machine"]["gpu"] or f"CPU ({head['machine']['cpu']})"
    console.print(f"{where}, {args.dtype}; a copy reaches {bandwidth / 1e9:.0f} GB/s; green: the fastest")
    for table in tables(rows):
        console.print(table)
    for op, reasons in unavailable.items():
        for impl_id, reason in reasons.items():
            console.print(f"{op}: {impl_id} is not available: {reason}")
    for error in dict.fromkeys(f"{row['op']}: {row['impl']}: {row['error']}" for row in rows if row["error"]):
        console.print(error, markup=False)
    if device.type == "cpu":
        console.print("No CUDA device: these are wall times of eager calls on the CPU.")


if __name__ == "__main__":
    main()
