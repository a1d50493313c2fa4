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


def print_plan(console: Console, model: Path, argv: Sequence[str], directory: Path, *, resume: bool, update: Path | None) -> None:
    """Print what would be measured, and about how long it takes.

    Args:
        argv: the server's arguments.
        directory: the folder with the measurements of an earlier run with the same ``--out``.
        resume: leave out the measurements that it has.
        update: the profile whose entries are measured again.
    """
    journal, finished = directory / "journal.jsonl", directory / "finished.jsonl"
    begun = seconds_in(journal, argv) if journal.is_file() else {}
    ended = seconds_in(finished, argv) if finished.is_file() else {}
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
    if update:
        console.print(
            f"Of {update} only the entries whose conditions have changed are measured, so the plan is the most that it takes.", markup=False
        )
    if resume and begun:
        made = {kind: len(seconds) for kind, seconds in begun.items() if kind in KINDS}
        has = ", ".join(f"{count} {KINDS[kind].words}" for kind, count in made.items())
        console.print(f"{journal} has {has}. Still to come:", markup=False)
        left = _to_come(counts, made)
        _print_times(console, left, journal, begun, whole=left.keys() == {"start"})
        return
    if begun:
        console.print(f"{journal} has the measurements of an earlier run: continue it with --resume, or delete the file.", markup=False)
    counts = {kind: max(count, len(begun.get(kind, ()))) for kind, count in counts.items()}
    if not update:  # an earlier update measured other entries
        counts |= {kind: len(seconds) for kind, seconds in ended.items() if kind in counts}
    _print_times(console, counts, finished if ended else journal, ended or begun, whole=bool(ended))


def _to_come(counts: Mapping[str, int], made: Mapping[str, int]) -> dict[str, int]:
    """Without what was made. Once a fresh start was made, all else is decided."""
    left = {kind: max(0, count - made.get(kind, 0)) for kind, count in counts.items()}
    if "start" in made:
        return {"start": left["start"]}
    if "record" in made:
        left["noise"] = 0
    return {**left, "about": 1}  # an engine is started for the rest


def _print_times(console: Console, counts: Mapping[str, int], record: Path, earlier: Mapping[str, Sequence[float]], *, whole: bool) -> None:
    """Print the number and the time of each kind of measurement, and the source of the time. ``whole``: there can be no more."""
    total, times = 0.0, Budget(None, earlier)
    for kind, count in counts.items():
        seconds, measured = times.typical(kind, fmean)
        total += count * seconds
        source = f"as in {record}" if measured else "assumed"
        if count:
            words = "start of an engine" if kind == "about" else KINDS[kind].words
            console.print(f"  {count:4} {words}, about {seconds:.3g} s each ({source})", markup=False)
    and_more = "" if whole else " without FlagGems's functions, more if groups must be split"
    console.print(f"About {max(1, total / 60):.0f} min{and_more}. --budget limits the time of a run")
