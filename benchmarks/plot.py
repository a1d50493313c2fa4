#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draw what ``serving.py`` measured: speed as a multiple of the baseline's, with 95 % intervals.

    uv pip install '.[bench]'
    python benchmarks/plot.py serving.jsonl --out docs/serving.svg

A column for each model, a row each for prefill and decode, a mark for each variant and batch size. Of several runs of
a model the one with the most rounds counts, of those the one with the most variants. The same results give the same
file, byte for byte.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from serving_lib.results import read

# Okabe and Ito's colours, which colour-blind people can tell apart; each variant has a shape as well.
_STYLES = {
    "off": {"color": "#999999", "marker": "s"},
    "default": {"color": "#0072B2", "marker": "o"},
    "flagos": {"color": "#D55E00", "marker": "^"},
    "vendor": {"color": "#009E73", "marker": "D"},
    "reference": {"color": "#CC79A7", "marker": "v"},
}
_OTHERS = {"color": "#000000", "marker": "x"}
_PHASES = ("prefill", "decode")


def longest_runs(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The run of each model with the most rounds, of those the one that compares the most, in the order of first appearance."""
    found: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}
    for run in runs:
        compared = {row["variant"] for row in run["summary"] if "ratio" in row}
        worth = len(run["rounds"]), len(compared)
        if compared and worth >= found.get(run["model"], ((0, 0), run))[0]:
            found[run["model"]] = worth, run
    return {model: run for model, (_, run) in found.items()}


def draw_panel(axes: Any, run: dict[str, Any], phase: str, variants: list[str]) -> None:
    batches = sorted({int(row["case"].split("/")[1]) for row in run["summary"]})
    axes.axhline(1.0, color="#000000", linewidth=0.8, zorder=1)
    for index, variant in enumerate(variants):
        rows = {row["case"]: row for row in run["summary"] if row["variant"] == variant and "ratio" in row}
        shown = [(place, rows[f"{phase}/{batch}"]) for place, batch in enumerate(batches) if f"{phase}/{batch}" in rows]
        if not shown:
            continue
        at = [place + (index - (len(variants) - 1) / 2) * 0.18 for place, _ in shown]
        ratios = [row["ratio"] for _, row in shown]
        below = [row["ratio"] - row["low"] for _, row in shown]
        above = [row["high"] - row["ratio"] for _, row in shown]
        style = _STYLES.get(variant, _OTHERS)
        axes.errorbar(at, ratios, yerr=[below, above], linestyle="none", markersize=5, capsize=2.5, elinewidth=1.2, label=variant, **style)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlim(-0.6, len(batches) - 0.4)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(runs: dict[str, dict[str, Any]], variants: list[str], out: Path) -> None:
    """Write the figure."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sglang-fl", "font.family": "sans-serif", "font.size": 9})
    figure, grid = plt.subplots(
        len(_PHASES), len(runs), figsize=(max(5.5, 1.0 + 2.5 * len(runs)), 4.6), sharey="row", squeeze=False, layout="constrained"
    )
    for column, (model, run) in enumerate(runs.items()):
        for row, phase in enumerate(_PHASES):
            axes = grid[row][column]
            draw_panel(axes, run, phase, [variant for variant in variants if variant != run["baseline"]])
            if column == 0:
                axes.set_ylabel(f"{phase}\n× {run['baseline']}")
        grid[0][column].set_title(model, fontsize=9)
        grid[-1][column].set_xlabel("batch size")
    marks = {label: mark for axes in grid.flat for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [variant for variant in variants if variant in marks]
    figure.legend([marks[variant] for variant in shown], shown, loc="outside upper left", ncols=len(shown), frameon=False)
    devices = dict.fromkeys(run["machine"]["device"] or "CPU" for run in runs.values())
    figure.supxlabel(f"{', '.join(devices)}; higher is faster; bars: 95 % bootstrap intervals of the median", fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.jsonl", help="what serving.py wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/serving.svg"), metavar="FILE.svg", help="default: docs/serving.svg")
    parser.add_argument("--variants", default="off,default,flagos", metavar="A,B,…", help="which to show (default: off,default,flagos)")
    parser.add_argument("--models", metavar="A,B,…", help="which to show, in this order (default: all)")
    args = parser.parse_args()
    missing = [str(path) for path in args.results if not path.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    runs = longest_runs([run for path in args.results for run in read(path)])
    if args.models:
        unknown = [model for model in args.models.split(",") if model not in runs]
        if unknown:
            parser.error(f"no results of {', '.join(unknown)}; there are {', '.join(runs)}")
        runs = {model: runs[model] for model in args.models.split(",")}
    if not runs:
        parser.error("no run has two variants with rounds in common")
    draw(runs, args.variants.split(","), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
