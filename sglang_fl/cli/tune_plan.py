# SPDX-License-Identifier: Apache-2.0
"""``sglang-fl tune --dry-run``: the measurements of a run and their estimated time, as far as known before the recording."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console

from ..config import load_settings
from ..dispatch.manager import get_default_manager
from ..dispatch.ops import OPERATORS
from ..tune.budget import KINDS, Budget
from ..tune.journal import seconds_in
from ..tune.statistics import LOOKS
from .model_layers import model_layers

#: The assumed number of recorded calls of an operator, which differ in tokens, residual and head size.
_CALLS_OF_AN_OPERATOR = 6


def print_plan(console: Console, model: Path, argv: Sequence[str], directory: Path) -> None:
    """Print what would be measured, and about how long it takes.

    Args:
        argv: the server's arguments.
        directory: the folder with the measurements of an earlier run with the same ``--out``.
    """
    manager = get_default_manager()
    manager.ensure_initialized()
    operators = set(OPERATORS)
    if model.is_dir():
        operators &= {row.op for row in model_layers(model, dict.fromkeys(OPERATORS, ""), load_settings()) if row.op is not None}
    found = {op: [impl for impl in manager.registry.get_implementations(op) if impl.why_unavailable() is None] for op in sorted(operators)}
    console.print(
        "Implementations that can run here, of the model's operators:" if model.is_dir() else "Implementations that can run here:"
    )
    for op, impls in found.items():
        console.print(f"  {op}: {', '.join(impl.impl_id for impl in impls) or 'none'}", markup=False)
    console.print("Also the FlagGems functions for the ATen operators that the model calls, if FlagGems supports this device.")
    checks = _CALLS_OF_AN_OPERATOR * sum(map(len, found.values()))
    counts = {"about": 1, "noise": LOOKS[-1], "record": 1, "check": checks, "time": checks, "pair": 2 * LOOKS[0], "start": 4}
    record = next((path for name in ("finished", "journal") if (path := directory / f"{name}.jsonl").is_file()), None)
    _print_times(console, counts, record, {} if record is None else seconds_in(record, argv))


def _print_times(console: Console, counts: dict[str, int], record: Path | None, earlier: Mapping[str, Sequence[float]]) -> None:
    """Print the number and the time of each kind of measurement, and the source of the time."""
    total, times = 0.0, Budget(None, earlier)
    for kind, count in counts.items():
        seconds, measured = times.typical(kind, fmean)
        made = len(earlier.get(kind, ()))
        count = made if record is not None and record.stem == "finished" and made else max(count, made)
        total += count * seconds
        source = f"as in {record}" if measured else "assumed"
        console.print(f"  {count:4} {KINDS[kind].words}, about {seconds:.3g} s each ({source})", markup=False)
    and_more = "" if earlier.get("check") else " without FlagGems's functions, more if groups must be split"
    console.print(f"About {max(1, total / 60):.0f} min{and_more}. --budget limits the time of a run")
