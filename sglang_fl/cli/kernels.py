# SPDX-License-Identifier: Apache-2.0
"""List the Triton and JIT kernels that SGLang calls outside of its layers, and count those that a model calls."""

import argparse
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..compat import installed_version
from ..config import SettingsError
from ..device import declared, probe
from ..dispatch.catalog import FUNCTIONS, LAYERS
from ..kernels.listing import GRID, PLAIN, Kernel, remembered_kernels
from ..kernels.reference import REFERENCES
from ..utils.tables import table
from .kernel_trace import read_record, trace_model
from .model_layers import sglang_folder

#: What can take over a layer, or a function.
_OPERATORS = {name: op for op, layers in LAYERS.items() for _, name in layers}
_OPERATORS |= {f"{module}:{name}": op for op, (module, name) in FUNCTIONS.items()}
_SHOWN_SITES, _SHOWN_KERNELS = 3, 4
_HOW = {GRID: "launched", PLAIN: "called"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("word", nargs="*", help="list those whose module, name or call sites have all of these words")
    parser.add_argument("--model", type=Path, metavar="DIR", help="list those that the model in DIR called when it was traced")
    parser.add_argument("--all", action="store_true", help="also those of layers that sglang-fl's operators replace")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--trace",
        nargs=argparse.REMAINDER,
        metavar="ARGUMENT",
        help="serve the model first, with these server arguments, and count the kernels of a few requests; must come last",
    )


def run(args: argparse.Namespace) -> int:
    if args.trace is not None and args.model is None:
        raise SettingsError("--trace needs --model DIR")
    root = sglang_folder()
    failed = args.trace is not None and not trace_model(args.model, args.trace)
    record = read_record(args.model) if args.model else None
    with Console(stderr=True).status("reading SGLang's source (once per version)"):
        found = [kernel for kernel in remembered_kernels(root, _OPERATORS) if _has(kernel, args.word)]
    shown = [kernel for kernel in found if args.all or kernel.operator is None]
    replaced = _replaced_here()
    counts = _reached(shown, record["counts"]) if record else None
    if counts is not None:
        shown = [kernel for kernel in shown if counts[kernel.target]]
    if args.json:
        rows = [
            {
                **asdict(kernel),
                "reference": kernel.target in REFERENCES,
                "replaced_by": replaced.get(kernel.target),
                **({"reached": counts[kernel.target]} if counts is not None else {}),
            }
            for kernel in shown
        ]
        about = {name: value for name, value in record.items() if name != "counts"} if record else None
        print(json.dumps({"sglang": installed_version(), "trace": about, "kernels": rows}, indent=2, ensure_ascii=False))
        return int(failed)
    console = Console(markup=False, emoji=False, highlight=False)
    if record:
        console.print(_about(record))
    if not shown:
        console.print("None." if not args.word else f"None has {' and '.join(map(repr, args.word))}.")
    elif record or args.word:
        for module, group in groupby(shown, key=lambda kernel: kernel.module):
            console.print(_table(module, list(group), counts, replaced))
    else:
        console.print(_summary(shown, replaced))
        console.print("sglang-fl kernels WORD lists those that have the word in their module, name or call sites.")
    if hidden := 0 if record else len(found) - len(shown):
        console.print(f"Not shown: {hidden} that sglang-fl's operators replace (--all shows them).", style="dim")
    return int(failed)


def _replaced_here() -> dict[str, str]:
    """The kernels that the package of this chip replaces, each with its implementation."""
    vendor = probe().vendor
    declaration = declared().platforms.get(vendor)
    return dict.fromkeys(declaration.sglang_kernels if declaration is not None else (), f"vendor.{vendor}")


def _has(kernel: Kernel, words: Sequence[str]) -> bool:
    text = "\n".join([kernel.target, *kernel.launches, *(f"{site.file} {site.where}" for site in kernel.sites)]).lower()
    return all(word.lower() in text for word in words)


def _reached(kernels: Sequence[Kernel], counts: dict[str, int]) -> dict[str, int]:
    """How often each was called.

    To make an object of a class launches nothing: it counts by what its methods come to. And where something runs in the place
    of the runtime's function that launches a kernel, the kernel counts by that.
    """

    def names(kernel: Kernel) -> Iterator[str]:
        yield kernel.target
        if _is_class(kernel):
            yield from (*kernel.launches, *kernel.through)
        if kernel.call == GRID:
            yield from (f"{site.file.removesuffix('.py').replace('/', '.')}:{site.where}" for site in kernel.sites)

    return {kernel.target: max(counts.get(name, 0) for name in names(kernel)) for kernel in kernels}


def _is_class(kernel: Kernel) -> bool:
    return kernel.name.lstrip("_")[:1].isupper()


def _about(record: dict[str, Any]) -> str:
    about = f"{record['model']}, served on {record['device']} by SGLang {record['sglang']}, {record['date']}"
    about += f", with {' '.join(record['arguments'])}" if record["arguments"] else ""
    about += ". SGLang has another version now: trace again" if record["sglang"] != installed_version() else ""
    return about + (f". The server failed: {record['failed'].splitlines()[-1]}" if record["failed"] else "")


def _summary(kernels: Sequence[Kernel], replaced: Collection[str]) -> Table:
    numbers = ("launched", "called", "reference", *(("replaced",) if replaced else ()))
    title = f"Kernels of SGLang {installed_version()}: {len(kernels)} to replace"
    shown = table(title, "module", *numbers, "from", right=numbers)
    for module, group in groupby(kernels, key=lambda kernel: kernel.module):
        members = list(group)
        launched = sum(kernel.call != PLAIN for kernel in members)
        files = Counter(site.file.removeprefix("sglang/srt/") for kernel in members for site in kernel.sites)
        first, *others = (file for file, _ in files.most_common())
        counts = [launched, len(members) - launched, *(sum(kernel.target in some for kernel in members) for some in (REFERENCES, replaced))]
        row = [str(count or "") for count in counts[: len(numbers)]]
        shown.add_row(module, *row, f"{first} (+{len(others)})" if others else first)
    return shown


def _table(module: str, kernels: Sequence[Kernel], counts: dict[str, int] | None, replaced: Mapping[str, str]) -> Table:
    shown = Table(title=f"{module}:", title_justify="left", expand=True)
    shown.add_column("name", ratio=4, overflow="fold")
    shown.add_column("", width=8)
    if counts is not None:
        shown.add_column("times", justify="right", width=7)
    shown.add_column("from sglang/srt/ → kernels", ratio=6, overflow="fold")
    for kernel in kernels:
        reached = [str(counts[kernel.target])] if counts is not None else []
        shown.add_row(kernel.name, _HOW[kernel.call], *reached, "\n".join(_lines(kernel, replaced)))
    return shown


def _lines(kernel: Kernel, replaced: Mapping[str, str]) -> Iterator[str]:
    sites = [str(site).removeprefix("sglang/srt/") for site in kernel.sites]
    yield from sites[:_SHOWN_SITES]
    if len(sites) > _SHOWN_SITES:
        yield f"and {len(sites) - _SHOWN_SITES} more"
    if _is_class(kernel):  # only what it calls can be replaced
        yield "through " + ", ".join(name.partition(":")[2] for name in kernel.through)
    if kernel.target in replaced:
        yield f"replaced by {replaced[kernel.target]}"
    if kernel.target in REFERENCES:
        yield "has a reference in plain PyTorch"
    names = [name.partition(":")[2] or name for name in kernel.launches]
    if names:
        yield f"→ {', '.join(names[:_SHOWN_KERNELS])}" + (f" and {len(names) - _SHOWN_KERNELS} more" if names[_SHOWN_KERNELS:] else "")
