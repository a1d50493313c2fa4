#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a platform's profile from what was measured on one of its GPUs.

    python benchmarks/make_profile.py            # writes sglang_fl/config/nvidia.yaml
    python benchmarks/make_profile.py --check    # exits with 1 and a diff if the file would change

It reads ``ops-<gpu>.json`` (of ``ops.py``), ``aten-<gpu>.json`` (FlagGems's functions on recorded calls) and ``serving-<gpu>.jsonl`` (of
``serving.py``) in benchmarks/results; ``--gpu nvidia-h100`` says which, if there is more than one. What ``ops.py --op`` measured
in further sittings is in ``ops-<gpu>.2.json`` and so on; an operator's figures are those of the last file that has it.

The rule. Something of FlagOS's goes into the profile if, against what SGLang or PyTorch does by itself,
  1. it is right, and nothing failed at any shape;
  2. it is nowhere slower: its time ratio is at most 1.02 at every shape, and known to within 0.1 (the width of its
     95 % interval);
  3. it gains at least 2 % in the median over the shapes, of which there are six or more.
For an operator (Layer 2) the implementation with the least median ratio goes first, then SGLang's own, if
  4. a model was served with it, and with nothing else of FlagOS's, and no phase at any batch size is slower than 0.98 of
     native's speed beyond its 95 % interval: SGLang prefills some models outside graphs, where a call costs the host more
     than the same call in a loop. Any run can speak against it; one that speaks for it has six rounds or more, of prefill and
     decode at batch 1 and at 32 or more.
For an ATen function (Layer 1) being right includes that its call replays in a graph with new data, and one
that serving also calls outside graphs must keep to 2. on the host as well. What is random cannot be shown
to be right, and stays out. And
  5. serving calls it in at least one forward pass of ten (counted by the calls of ``embedding``): FlagGems costs
     its import at start-up, and a kernel its compilation at the first call, which a rare gain does not repay.
``triton_faster`` lists the operators whose Triton kernel of this package goes before FlagGems's where FlagOS is preferred: it is right
at every shape, at least 2 % faster than FlagGems's in the median, from 64 tokens on nowhere above 1.10 of its time, and with fewer
nowhere more than 1 µs slower, in every sitting that measured both:
``triton-<gpu>.json`` (of ``ops.py``), on any GPU of the platform.
An ATen function that was wrong (also: in a graph that serving captured), or ended the process, is in ``flagos_broken``: it
stays with PyTorch too where a user prefers FlagOS for everything. A name leaves that list only by results that show it right.
``flagos_slower`` has those whose kernels took longer in a step of a served model than the kernels that they replaced, in each trace
of ``serving.py --profile`` where both are known by name (:data:`_IN_TRACES`): ``serving-*.jsonl``, on any GPU of the platform. They
stay with PyTorch too where a user prefers FlagOS for everything.
"""

import argparse
import difflib
import re
import statistics
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import result_file
import schemas
import yaml
from machine import PACKAGES
from serving_lib.results import read as read_runs
from serving_lib.summary import LEAST_ROUNDS

from sglang_fl.config.errors import suggest
from sglang_fl.dispatch.catalog import FUNCTIONS, LAYERS
from sglang_fl.dispatch.ops import OPERATORS

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PROFILE = ROOT / "benchmarks" / "results", ROOT / "sglang_fl" / "config" / "nvidia.yaml"
MAX_RATIO, MAX_MEDIAN, MAX_WIDTH = 1.02, 0.98, 0.1
#: A model calls it once in each forward pass.
_PASS = "embedding"
LEAST_CALLS_PER_PASS = 0.1
#: What this package's Triton kernels may take of FlagGems's time from so many tokens on, and how many µs more with fewer.
MAX_OF_FLAGGEMS, FROM_TOKENS, MAX_MORE_US = 1.1, 64, 1.0
LEAST_SHAPES = 6
#: Up to which a run that speaks for an implementation must go.
LEAST_BATCH = 32
#: Of native's speed, what a served model must reach.
LEAST_SPEED = 0.98
#: What a line of the dispatch log says, such as ``RMSNorm → flagos(default.flagos)``.
_DISPATCHED = re.compile(r"(?P<name>\w+) → (?P<kind>\w+)\((?P<impl>.*)\)")
#: Variables that let FlagOS run more than an operator.
_MORE = frozenset({"SGLANG_FL_PREFER", "SGLANG_FL_FLAGOS_WHITELIST", "SGLANG_FL_FLAGOS_BLACKLIST", "SGLANG_FL_DIST_BACKEND"})
#: What was said of a call that no process survives.
_ENDED = "it ended its process"
#: And of one whose graph gave other results than the call.
_REPLAYED = "replayed with new data"
_FAMILIES = ("flagos", "triton", "vendor")
#: The name of a further sitting's file ends so.
_FURTHER = re.compile(r"\.[0-9]+\.json$")
_WIDTH = 110
#: FlagGems function -> patterns of the names in a trace: of its kernels, and of the PyTorch kernels that they replace.
_IN_TRACES = {"mm": (r"^mm_kernel", r"nvjet|splitKreduce|cutlass.*gemm|ampere.*gemm|gemmk1|gemvx")}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether something goes into the profile, and why."""

    name: str
    accepted: bool
    reason: str
    median: float = float("inf")
    broken: bool = False


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"


def _worst(rows: Sequence[Row], name: str) -> Row | None:
    """The row whose ratio is furthest above what is allowed, or None."""
    slower = [row for row in rows if row.get(name) and row[name][0] > MAX_RATIO]
    return max(slower, key=lambda row: row[name][0], default=None)


def _vague(rows: Sequence[Row], name: str) -> str | None:
    """What is wrong with a measurement that does not decide, or None."""
    for row in rows:
        ratio = row.get(name)
        if ratio and ratio[1] <= MAX_RATIO < ratio[2] and ratio[2] - ratio[1] > MAX_WIDTH:
            return f"measured too vaguely ({_times(ratio[0])}, {_times(ratio[1])} to {_times(ratio[2])}); measure again"
    return None


# Layer 2


def _shape(row: Row) -> str:
    return f"{row['tokens']}x{row['hidden']}{' ' + row['variant'] if row.get('variant') else ''}"


def judge_implementation(impl: str, rows: Sequence[Row], shapes: int) -> Verdict:
    """``rows`` are this implementation's of one operator; ``shapes`` is how many there should be."""
    failed = next((row for row in rows if row.get("error")), None)
    if failed is not None:
        return Verdict(impl, False, f"failed at {_shape(failed)}: {failed['error']}")
    timed = [row for row in rows if row.get("ratio")]
    if len(timed) < max(shapes, LEAST_SHAPES):
        return Verdict(impl, False, f"timed at {len(timed)} of {max(shapes, LEAST_SHAPES)} shapes only")
    worst = _worst(timed, "ratio")
    if worst is not None:
        return Verdict(impl, False, f"{_times(worst['ratio'][0])} times SGLang's time at {_shape(worst)}")
    vague = _vague(timed, "ratio")
    if vague is not None:
        return Verdict(impl, False, vague)
    return _by_gain(impl, timed, "SGLang's time")


def _in_the_median(ratios: Sequence[float], what: str) -> tuple[float, str]:
    median = statistics.median(ratios)
    return median, f"{median:.3f} times {what} in the median ({_times(min(ratios))} to {_times(max(ratios))})"


def _by_gain(name: str, timed: Sequence[Row], what: str) -> Verdict:
    median, figures = _in_the_median([row["ratio"][0] for row in timed], what)
    if median > MAX_MEDIAN:
        return Verdict(name, False, f"{figures}, which is no gain of 2 %", median)
    return Verdict(name, True, figures, median)


def _alone(run: Row, variant: str) -> tuple[frozenset[str], str] | None:
    """The classes and functions that ran on FlagOS in a variant, and on which implementation, if that is one and nothing else was."""
    lines = [_DISPATCHED.fullmatch(line) for line in run["dispatched"].get(variant, ())]
    ours = [line for line in lines if line is None or line["kind"] != "sglang"]
    if not ours or _MORE & run["variants"][variant].keys():
        return None
    names, impls = set(), set()
    for line in ours:
        if line is None:
            return None
        names.add(line["name"])
        impls.add(line["impl"])
    return (frozenset(names), impls.pop()) if len(impls) == 1 else None


def as_served(verdict: Verdict, op: str, runs: Sequence[Row]) -> Verdict:
    """The verdict on an implementation that is faster by itself, after what was served with it."""
    names = {FUNCTIONS[op][1]} if op in FUNCTIONS else {name for _, name in LAYERS.get(op, ())}
    whole = False
    for run in runs:
        for variant in run["variants"]:
            alone = _alone(run, variant)
            if alone is None or run["baseline"] != "native" or alone[1] != verdict.name or not alone[0] <= names:
                continue
            found = [row for row in run["summary"] if row["variant"] == variant and "ratio" in row]
            whole |= _is_whole(run, found)
            slowest = min(found, key=lambda row: row["high"], default=None)
            if slowest is not None and slowest["high"] < LEAST_SPEED:
                speed = f"{slowest['ratio']:.2f} of native's speed in {slowest['case']} ({slowest['low']:.2f} to {slowest['high']:.2f})"
                return replace(verdict, accepted=False, reason=f"{verdict.reason}; but serving {run['model']} with it has {speed}")
    if not whole:
        return replace(verdict, accepted=False, reason=f"{verdict.reason}; but no model was served with it alone")
    return verdict


def _is_whole(run: Row, found: Sequence[Row]) -> bool:
    """Whether these ratios of a run are enough to speak for what was served."""
    cases = [row["case"].split("/") for row in found]
    batches = {phase: {int(batch) for other, batch in cases if other == phase} for phase in ("prefill", "decode")}
    enough = all(1 in found and max(found) >= LEAST_BATCH for found in batches.values())
    return enough and len(run["rounds"]) >= LEAST_ROUNDS


def order_of(op: str, rows: Sequence[Row], runs: Sequence[Row]) -> tuple[list[str], list[Verdict]]:
    """An operator's order, and the verdict on each implementation that was measured.

    Args:
        rows: of ``ops.py``.
        runs: of ``serving.py``.
    """
    mine = [row for row in rows if row["op"] == op]
    shapes = len(set(map(_place, mine)))
    impls: dict[str, list[Row]] = {}
    for row in mine:
        if row["kind"] in _FAMILIES:
            impls.setdefault(row["impl"], []).append(row)
    verdicts = [judge_implementation(impl, found, shapes) for impl, found in sorted(impls.items())]
    verdicts = [as_served(verdict, op, runs) if verdict.accepted else verdict for verdict in verdicts]
    accepted = [verdict for verdict in verdicts if verdict.accepted]
    if not accepted:
        return ["sglang"], verdicts
    best = min(accepted, key=lambda verdict: (verdict.median, verdict.name)).name
    kind = impls[best][0]["kind"]
    alone = len({row["impl"] for row in mine if row["kind"] == kind}) == 1
    return [kind if alone else f"impl:{best}", "sglang"], verdicts


def judge_triton(op: str, rows: Sequence[Row]) -> Verdict | None:
    """This package's Triton kernel of an operator against FlagGems's; None where they were not both measured."""
    ours, theirs = ({_place(row): row for row in rows if (row["op"], row["kind"]) == (op, kind)} for kind in ("triton", "flagos"))
    if not ours or not theirs:
        return None
    failed = next((row for row in ours.values() if not row.get("ratio")), None)
    if failed is not None:
        return Verdict(op, False, f"failed at {_shape(failed)}: {failed.get('error')}")
    if len(ours) < max(len(theirs), LEAST_SHAPES):
        return Verdict(op, False, f"timed at {len(ours)} of {max(len(theirs), LEAST_SHAPES)} shapes only")
    ratios = {shape: ours[shape]["ratio"][0] / row["ratio"][0] for shape, row in theirs.items() if shape in ours and row.get("ratio")}
    if not ratios:
        return Verdict(op, True, "FlagGems's failed at every shape")
    for shape, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
        row, more = ours[shape], ours[shape]["us"] - theirs[shape]["us"]
        if ratio > MAX_OF_FLAGGEMS if row["tokens"] >= FROM_TOKENS else more > MAX_MORE_US:
            return Verdict(op, False, f"{_times(ratio)} times FlagGems's time at {_shape(row)} ({row['us']:.2f} µs)")
    median, figures = _in_the_median(list(ratios.values()), "FlagGems's time")
    own = [row["ratio"][0] for row in ours.values()]
    figures += f", {_times(statistics.median(own))} times SGLang's ({_times(min(own))} to {_times(max(own))})"
    return Verdict(op, median <= MAX_MEDIAN, figures, median)


# Layer 1


def judge_function(function: str, rows: Sequence[Row], passes: int) -> Verdict:
    """``rows`` are this function's, under all ATen names that it stands for; ``passes`` is how many forward passes were recorded."""
    faults: list[str] = []
    broken = False
    for row in rows:
        where = f"{row['key']}({row['call']})"
        if row.get("error"):
            faults.append(f"{where}: {_told(row['error'])}")
            broken |= _ENDED in row["error"]
        elif row.get("right") is not True:
            faults.append(f"{where}: {row.get('why') or 'not shown to be right'}")
            broken |= row.get("right") is False
        elif row.get("graph_safe") is False or (row.get("graph_safe") is None and row["seen_captured"] and not _no_graph_holds(row)):
            faults.append(f"{where} in a graph: {row.get('graph_why') or 'not shown to work'}")
            broken |= bool(row["seen_captured"]) and str(row.get("graph_why")).startswith(_REPLAYED)
    timed = [row for row in rows if row.get("ratio")]
    slower = _worst(timed, "ratio")
    slower_on_host = _worst([row for row in rows if row["seen_eager"]], "host_ratio")
    figures = []
    if slower is not None:
        figures.append(f"{_times(slower['ratio'][0])} times PyTorch's time in a graph ({slower['call']})")
    if slower_on_host is not None:
        figures.append(f"{_times(slower_on_host['host_ratio'][0])} times on the host ({slower_on_host['call']})")
    reasons = [", ".join(figures), *faults[:1]] if figures else faults[:1]
    if broken:
        reasons = [next((fault for fault in faults if _ENDED in fault), faults[0])]
    if reasons:
        return Verdict(function, False, "; ".join(reasons), broken=broken)
    vague = _vague(timed, "ratio") or _vague([row for row in rows if row["seen_eager"]], "host_ratio")
    if vague is not None:
        return Verdict(function, False, vague)
    in_graphs = [row for row in rows if not _no_graph_holds(row)]
    if not timed or len(timed) < len(in_graphs) or any(row["seen_eager"] and not row.get("host_ratio") for row in rows):
        return Verdict(function, False, "not all of its calls were timed")
    verdict = _by_gain(function, timed, "PyTorch's time in a graph")
    calls = _calls(rows)
    if verdict.accepted and calls < LEAST_CALLS_PER_PASS * passes:
        return Verdict(function, False, f"{verdict.reason}, but called in {calls} of {passes} forward passes only", verdict.median)
    return verdict


def _no_graph_holds(row: Row) -> bool:
    """Whether PyTorch's own cannot be captured with these arguments either."""
    return row.get("graph_safe") is None and "cannot be captured either" in (row.get("graph_why") or "")


def _calls(rows: Sequence[Row]) -> int:
    """How often serving called the operators of these rows."""
    return sum({row["key"]: row["seen_eager"] + row["seen_captured"] for row in rows}.values())


def judge_functions(rows: Sequence[Row]) -> list[Verdict]:
    by_function: dict[str, list[Row]] = {}
    for row in rows:
        by_function.setdefault(row["function"], []).append(row)
    passes = _calls([row for row in rows if row["key"] == _PASS])
    return [judge_function(function, found, passes) for function, found in sorted(by_function.items())]


# The file


def _wrap(text: str, first: str, then: str) -> list[str]:
    """Lines that begin so."""
    words = " ".join(text.split())
    return textwrap.wrap(words, _WIDTH, initial_indent=first, subsequent_indent=then, break_long_words=False, break_on_hyphens=False)


def _comment(text: str, indent: str = "") -> list[str]:
    return _wrap(text, f"{indent}# ", f"{indent}#   ")


def _paragraph(text: str) -> list[str]:
    return _wrap(text, "# ", "# ")


def _list(key: str, names: Sequence[str]) -> list[str]:
    return _wrap(f"{key}: [{', '.join(names)}]", "", "  ")


def _told(error: str) -> str:
    """An error as it is shown: of a failed assertion in C++, not where that was compiled."""
    return re.sub(r"\S+: \S+\.cc:\d+: .*?: (?=Assertion )", "", error)


def _triton_faster(sittings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines about this package's Triton kernels; none where none was measured. An operator must be faster in each sitting."""
    if not sittings:
        return
    where = "; ".join(f"{result['machine']['gpu']} on {result['date']}: {name}" for name, result in sorted(sittings.items()))
    yield ""
    yield from _paragraph(f"Where FlagOS is preferred, this package's Triton kernels go before FlagGems's for these operators ({where}).")
    faster = []
    for op in sorted(OPERATORS):
        verdicts = [verdict for _, result in sorted(sittings.items()) if (verdict := judge_triton(op, result["rows"])) is not None]
        for verdict in verdicts:
            yield from _comment(f"{op}: {verdict.reason}")
        if verdicts and all(verdict.accepted for verdict in verdicts):
            faster.append(op)
    yield from _list("triton_faster", faster)


class Traced(NamedTuple):
    """GPU time per step, in microseconds: of a FlagGems function's kernels, and of the kernels that they replace."""

    ratio: float
    flagos: float
    own: float
    where: str


def traced(function: str, runs: Sequence[Row]) -> Iterator[Traced]:
    """The times of a function's kernels in the traces of served models. Kernels that both engines ran are not counted."""
    names = _IN_TRACES[function]
    for run in runs:
        windows = (run.get("profile") or {}).get("windows", {})
        for variant, phases in windows.items():
            for phase, window in phases.items() if variant != run["baseline"] else ():
                flagos, kept = (_time_of(window, name) for name in names)
                own = _time_of(windows[run["baseline"]][phase], names[1]) - kept
                if flagos and own > 0:
                    yield Traced(flagos / own, flagos, own, f"{run['model']}, {phase}, {run['machine']['device']}")


def _time_of(window: Mapping[str, Any], name: str) -> float:
    return sum(float(kernel["microseconds_per_step"]) for kernel in window["top"] if re.search(name, kernel["name"]))


def _flagos_slower(runs: Sequence[Row]) -> Iterator[str]:
    """The profile's lines about functions that make a step slower. No lines if none does or none was traced."""
    measured = {function: sorted(traced(function, runs)) for function in _IN_TRACES}
    slower = {function: found for function, found in measured.items() if found and found[0].ratio > MAX_RATIO}
    if not slower:
        return
    yield ""
    yield from _paragraph("These make a step of a served model slower. They stay with PyTorch where FlagOS is preferred.")
    for function, found in slower.items():
        worst = found[-1]
        yield from _comment(
            f"{function}: its kernels took {found[0].ratio:.2f} to {worst.ratio:.2f} times as long as the kernels that they replaced, in "
            f"{len(found)} traces; the worst took {worst.flagos:.0f} instead of {worst.own:.0f} µs a step ({worst.where})"
        )
    yield from _list("flagos_slower", list(slower))


def profile(
    ops: Mapping[str, Any],
    aten: Mapping[str, Any],
    runs: Sequence[Row],
    gpu: str,
    triton: Mapping[str, Mapping[str, Any]] | None = None,
    traces: Sequence[Row] = (),
) -> str:
    """The profile's text, from the results of :func:`read_ops`, :func:`read_aten`, :func:`read_served`, :func:`read_triton` and
    :func:`read_traces`.

    Raises:
        ValueError: the two results are not of the same GPU and versions, or the forward passes were not counted.
    """
    if aten["rows"] and not any(row["key"] == _PASS for row in aten["rows"]):
        raise ValueError(f"aten-{gpu}.json has no call of {_PASS}, by which forward passes are counted; record and measure again")
    for part in ("machine", "versions"):
        mine, other = (result[part] if part == "versions" else result[part]["gpu"] for result in (ops, aten))
        if mine != other:
            raise ValueError(f"ops-{gpu}.json and aten-{gpu}.json are not of one machine: {part} {mine} and {other}; measure both again")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(ops["versions"].items()))
    dates = " and ".join(sorted({*ops["dates"], aten["date"]}))
    names = ", ".join([*ops["files"], f"aten-{gpu}.json ({aten['date']})", f"serving-{gpu}.jsonl"])
    lines = [
        *_paragraph("NVIDIA GPUs. Written by benchmarks/make_profile.py; do not edit, run it again:"),
        "#     python benchmarks/make_profile.py",
        *_paragraph(f"Measured on {ops['machine']['gpu']} on {dates} ({versions}); the figures are in benchmarks/results: {names}."),
        *_paragraph(
            "The rule: something of FlagOS's is used if it is right at every shape, nowhere slower than what it replaces (time ratio at "
            f"most {MAX_RATIO}), at least 2 % faster in the median, and, for an operator, not slower in a served model with nothing else "
            "of FlagOS's, for an ATen function, called in at least one forward pass of ten."
        ),
        *(line for result in (ops, aten) if result.get("note") for line in _paragraph(f"Note: {result['note']}")),
        "",
        *_paragraph(f"Layer 2, in {ops['dtype']}, in CUDA graphs."),
        "op_backends:",
    ]
    for op in sorted(OPERATORS):
        order, verdicts = order_of(op, ops["rows"], runs)
        if not verdicts:
            lines += _comment("nothing of FlagOS's was measured", "  ")
        for verdict in verdicts:
            lines += _comment(f"{verdict.name}: {verdict.reason}", "  ")
        lines.append(f"  {op}: [{', '.join(order)}]")
    lines += _triton_faster(triton or {})
    verdicts = judge_functions(aten["rows"])
    lines += [
        "",
        *_paragraph(
            "Layer 1: the FlagGems functions that replace PyTorch's operators. Measured were those that serving "
            f"{', '.join(aten['models'])} calls; all others stay with PyTorch because they were not measured."
        ),
    ]
    for verdict in verdicts:
        if not verdict.broken:
            lines += _comment(f"{verdict.name}: {verdict.reason}")
    lines += _list("flagos_faster", [verdict.name for verdict in verdicts if verdict.accepted])
    lines += _comment("Called from Python the same kernels cost the host more than they save; in a graph they cost it nothing.")
    lines += ["flagos_scope: graphs"]
    broken = [verdict for verdict in verdicts if verdict.broken]
    if broken:
        lines += [
            "",
            *_paragraph("What does not work here stays with PyTorch also where FlagOS is preferred for everything (prefer: flagos)."),
        ]
        for verdict in broken:
            lines += _comment(f"{verdict.name}: {verdict.reason}")
        lines += _list("flagos_broken", [verdict.name for verdict in broken])
    lines += _flagos_slower(traces)
    return "\n".join(lines) + "\n"


def read_ops(results: Path, gpu: str) -> dict[str, Any]:
    """The results of all sittings on a GPU as one: each operator's rows are those of the last file that has it.

    Raises:
        ValueError: a file is not as ops.py writes it, the files are not of the same GPU, versions and dtype, or an operator was
            measured at fewer shapes than before.
    """
    further = [path for path in results.glob(f"ops-{gpu}.*.json") if _FURTHER.search(path.name)]
    paths = [results / f"ops-{gpu}.json", *sorted(further, key=lambda path: int(path.name.split(".")[-2]))]
    found = [_read_sitting(path) for path in paths]
    first = found[0]
    for path, other in zip(paths[1:], found[1:], strict=True):
        for what in ("machine", "versions", "dtype"):
            one, two = (result[what]["gpu"] if what == "machine" else result[what] for result in (first, other))
            if one != two:
                name = "GPU" if what == "machine" else what
                raise ValueError(f"{path.name} and {paths[0].name} are not alike: {name} {two} and {one}; measure both again")
    rows: dict[str, list[Row]] = {}
    for path, result in zip(paths, found, strict=True):
        by_op: dict[str, list[Row]] = {}
        for row in result["rows"]:
            by_op.setdefault(row["op"], []).append(row)
        for op, mine in by_op.items():
            before, now = (set(map(_place, some)) for some in (rows.get(op, ()), mine))
            if not before <= now:
                raise ValueError(
                    f"{path.name} has {op} at {len(now)} shapes, without some of the {len(before)} before; measure it at all of them"
                )
        rows |= by_op
    notes = " ".join(dict.fromkeys(result["note"] for result in found if result.get("note")))
    joined = {
        **first,
        "rows": [row for mine in rows.values() for row in mine],
        "dates": sorted({result["date"] for result in found}),
        "files": [f"{path.name} ({result['date']})" for path, result in zip(paths, found, strict=True)],
    }
    return joined | ({"note": notes} if notes else {})


def _place(row: Row) -> tuple[str | None, int, int]:
    """Its operator's form, and its shape."""
    return row.get("variant"), row["hidden"], row["tokens"]


def _read_sitting(path: Path) -> dict[str, Any]:
    """A file of ``ops.py``. Raises ValueError if it is none, has an operator that there is not, or two of the same rows."""
    found = result_file.read(path)
    schemas.check(path.name, found, schemas.Ops)
    seen = set()
    for row in found["rows"]:
        if row["op"] not in OPERATORS:
            raise ValueError(f"{path.name}: there is no operator {row['op']!r}{suggest(row['op'], OPERATORS)}")
        what = (row["op"], row["impl"], *_place(row))
        if what in seen:
            raise ValueError(f"{path.name} has {row['op']} of {row['impl']} at {_shape(row)} twice")
        seen.add(what)
    return found


def read_triton(results: Path) -> dict[str, dict[str, Any]]:
    """The sittings in which this package's Triton kernels were measured beside FlagGems's, by file name. Raises ValueError."""
    return {path.name: _read_sitting(path) for path in sorted(results.glob("triton-*.json"))}


def _runs_in(path: Path) -> Iterator[tuple[int, Row]]:
    """The numbered runs of a file of ``serving.py``. Raises ValueError if a line is not a run."""
    for number, run in enumerate(read_runs(path), 1):
        schemas.check(f"run {number} of {path.name}", run, schemas.Served)
        yield number, run


def read_traces(results: Path) -> list[Row]:
    """The runs of ``serving.py`` on any GPU. Raises ValueError if a line is not a run."""
    return [run for path in sorted(results.glob("serving-*.jsonl")) for _, run in _runs_in(path)]


def read_aten(results: Path, gpu: str) -> dict[str, Any]:
    """FlagGems's functions on recorded calls. Raises ValueError if they are none."""
    path = results / f"aten-{gpu}.json"
    found = result_file.read(path)
    schemas.check(path.name, found, schemas.Aten)
    return found


def read_served(results: Path, ops: Mapping[str, Any], gpu: str) -> list[dict[str, Any]]:
    """The runs of ``serving.py`` on the GPU and with the versions of the operators' results; none if there is no file.

    Others are left out, which standard error says. Raises ValueError for what is no run.
    """
    path = results / f"serving-{gpu}.jsonl"
    wanted = {name: ops["versions"].get(name) for name in PACKAGES if name in ops["versions"]}
    mine = []
    for number, run in _runs_in(path) if path.exists() else ():
        found = {name: run["versions"].get(name) for name in wanted}
        if run["machine"]["device"] == ops["machine"]["gpu"] and found == wanted:
            mine.append(run)
        else:
            print(f"left out: run {number} of {path.name}, on {run['machine']['device']} with {found}", file=sys.stderr)
    return mine


def check_broken(profile: Path, rows: Sequence[Row]) -> None:
    """What was found broken stays so until it is shown right.

    Raises:
        ValueError: the profile that is there has a name in ``flagos_broken`` of which these results do not show that.
    """
    if not profile.exists():
        return
    there = yaml.safe_load(profile.read_text(encoding="utf-8"))
    broken = {verdict.name for verdict in judge_functions(rows) if verdict.broken}
    for name in (there or {}).get("flagos_broken") or ():
        mine = [row for row in rows if row["function"] == name]
        if name not in broken and not (mine and all(row.get("right") is True and not row.get("error") for row in mine)):
            raise ValueError(
                f"{name} is in flagos_broken of {profile.name}, and these results do not show that it is right now; measure it "
                "again, or take it off that list yourself if it should never have been there"
            )


def find_gpu(results: Path, wanted: str | None) -> str:
    """The GPU that there are results of.

    Raises:
        ValueError: there are none, or of several GPUs and none is named.
    """
    found = sorted(path.stem.removeprefix("ops-") for path in results.glob("ops-*.json") if not _FURTHER.search(path.name))
    if wanted is not None and wanted in found:
        return wanted
    if not found or wanted is not None:
        name = wanted or "<gpu>"
        raise ValueError(f"there is no ops-{name}.json in {results}; run benchmarks/ops.py --out {results.name}/ops-{name}.json on the GPU")
    if len(found) > 1:
        raise ValueError(f"there are results of {', '.join(found)}; choose one with --gpu")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 and a diff if the profile would change")
    parser.add_argument("--gpu", metavar="NAME", help="the <gpu> of the result files' names")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    parser.add_argument("--profile", type=Path, default=PROFILE, metavar="FILE.yaml")
    args = parser.parse_args()
    try:
        gpu = find_gpu(args.results, args.gpu)
        ops, aten = read_ops(args.results, gpu), read_aten(args.results, gpu)
        check_broken(args.profile, aten["rows"])
        text = profile(ops, aten, read_served(args.results, ops, gpu), gpu, read_triton(args.results), read_traces(args.results))
    except (OSError, ValueError) as error:
        sys.exit(f"make_profile: {error}")
    if not args.check:
        args.profile.write_text(text, encoding="utf-8")
        print(f"{args.profile.name} was written from the results on {gpu}")
        return
    there = args.profile.read_text(encoding="utf-8") if args.profile.exists() else ""
    if there != text:
        sys.stdout.writelines(
            difflib.unified_diff(there.splitlines(True), text.splitlines(True), args.profile.name, f"from {gpu}'s results")
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
