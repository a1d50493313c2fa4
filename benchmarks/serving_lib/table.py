# SPDX-License-Identifier: Apache-2.0
"""A run as tables."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from serving_lib.summary import resolved


def speed_table(run: dict[str, Any]) -> Table:
    """A row for each phase and batch, a column for each variant.

    Where the noise is too large for a ratio, there is the interval alone, and that it is not resolved.
    """
    up = [name for name in run["variants"] if any(row["variant"] == name for row in run["summary"])]
    rows = {(row["case"], row["variant"]): row for row in run["summary"]}
    device = run["machine"]["device"] or f"{run['machine']['cpu_count']}-core {run['machine']['cpu']}"
    again = f"{run['baseline']}-again"
    table = Table(
        title=f"{run['model']} on {device}, {len(run['rounds'])} rounds; speed as a multiple of {run['baseline']}'s [95 %]",
        title_justify="left",
    )
    table.add_column("phase")
    table.add_column("batch", justify="right")
    for name in up:
        table.add_column(name, justify="right", no_wrap=True)
    for case in dict.fromkeys(row["case"] for row in run["summary"]):
        phase, batch = case.split("/")
        table.add_row(phase, batch, *(_speed(phase, rows.get((case, name)), rows.get((case, again))) for name in up))
    return table


def _speed(phase: str, row: dict[str, Any] | None, again: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    value = f"{row['seconds'] * 1e3:.3f} ms/step" if phase == "decode" else f"{row['tokens_per_second']:,.0f} tok/s"
    if "ratio" in row:
        ratio = f"{row['ratio']:.3f}" if resolved(row, again) else "not resolved"
        value += f"  {ratio} [{row['low']:.3f}, {row['high']:.3f}]"
    return value


def step_table(run: dict[str, Any]) -> Table | None:
    """The GPU time of a step by engine, one row for each traced window. None if nothing was traced.

    It is the time in which at least one kernel ran. Older records have only the sum of the kernels' durations.
    """
    windows = (run.get("profile") or {}).get("windows", {})
    if run["baseline"] not in windows or any(window["kind"] != "kernels" for window in windows[run["baseline"]].values()):
        return None
    key, meaning = "busy_microseconds_per_step", "at least one kernel runs"
    if any(key not in window for found in windows.values() for window in found.values()):
        key, meaning = "microseconds_per_step", "sum of its kernels' durations, which may overlap"
    table = Table(title=f"GPU time of a step ({meaning}), and as a multiple of {run['baseline']}'s", title_justify="left")
    for name in ("step", *windows):
        table.add_column(name, justify="right", no_wrap=True)
    for step, window in windows[run["baseline"]].items():
        times = [windows[name].get(step, {}).get(key) for name in windows]
        table.add_row(step, *("–" if us is None else f"{us:.0f} µs  {us / window[key]:.3f}" for us in times))
    return table


def other_table(run: dict[str, Any]) -> Table:
    """A row for each variant: start-up, memory, tokens, kernels, Python's calls."""
    table = Table(title=f"Against {run['baseline']}", title_justify="left")
    for column in ("variant", "start-up", "device memory", "tokens", "kernels", "Python calls"):
        table.add_column(column)
    for name in run["variants"]:
        if name in run["startup"]:
            seconds = _against([run["startup"].get(n, {}).get("spawn_to_ready") for n in (run["baseline"], name)], ".1f", "s")
            memory = [run["memory"].get(n) for n in (run["baseline"], name)]
            windows = (_windows(run.get(what, {}).get(name)) for what in ("kernels", "python"))
            table.add_row(name, seconds, _memory(*memory), _tokens(run["tokens"].get(name)), *windows)
        else:
            table.add_row(name, "failed", "", "", "", "")
    return table


def _against(values: Sequence[float | None], form: str, unit: str) -> str:
    """A value, and how far it is from the baseline's, which comes first."""
    baseline, value = values
    if value is None:
        return "–"
    return f"{value:{form}} {unit}" + (f" ({value - baseline:+{form}})" if baseline is not None else "")


def _memory(baseline: dict[str, Any] | None, memory: dict[str, Any]) -> str:
    """What the driver says, or else what SGLang says."""
    if memory["device_gib"] is not None:
        return _against([baseline["device_gib"] if baseline else None, memory["device_gib"]], ".2f", "GiB")
    said = memory["sglang"]
    if not said:
        return "–"
    return f"weights {said['weight']:.2f}, KV {said['kvcache']:.2f}, graphs {sum(said['graph'].values()):.2f} GB"


def _tokens(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    if "verdict" not in found:
        return "failed"
    return found["verdict"] if found["identical"] else f"{found['verdict']} at {found['first_difference']}"


def _windows(found: dict[str, Any] | None) -> str:
    """Window by window; a window that differs with how many names do."""
    if not found:
        return "–"
    if "error" in found:
        return "failed"
    told = {window: "same" if c["identical"] else f"{len(c['differing'])} differ" for window, c in found.items()}
    return ", ".join(f"{window}: {what}" for window, what in told.items())
