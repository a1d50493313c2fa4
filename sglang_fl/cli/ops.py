# SPDX-License-Identifier: Apache-2.0
"""Show every operator's implementations, the order in force, and which one is selected."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..check.certificates import NEVER, Certificates, certificates
from ..config import Settings
from ..device import Device, detect, probe
from ..dispatch.backends.flaggems.library import why_not_here
from ..dispatch.bridge.catalog import FUNCTIONS, LAYERS, classes_of, names_in_lists
from ..dispatch.manager import OpManager, Plan, get_default_manager
from ..dispatch.policy import SelectionPolicy
from ..fingerprint import compare, read, setting_facts, versions
from ..fingerprint.compare import ABSENT
from ..startup import check_settings
from ..startup.words import flaggems_functions
from .model_layers import LayerRow, model_layers

#: The least width of a column of names. Most are shorter, and the longest would take half of a terminal.
_NAME_WIDTH = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="show the layers of the model whose config.json is in DIR")
    parser.add_argument("--deep", action="store_true", help="import PyTorch and ask it for the device, as a server does")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--diff",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="show what two hosts do differently; each is a file with the output of --json, or a server's log",
    )


@dataclass(frozen=True)
class OpRow:
    """An operator: its implementations, their order, and the one that is selected.

    Attributes:
        picked: what its layers run on, before their trial.
        left: layer class -> why it stays with SGLang nevertheless.
        cannot_run: no implementation in the order in force is available here, and ``sglang`` is not in it.
    """

    op: str
    order: str
    order_from: str
    picked: str
    left: dict[str, str]
    implementations: list[dict[str, Any]]
    cannot_run: bool

    @property
    def certificate(self) -> str:
        """What the implementation that is selected was last found to be; empty if none is."""
        return next((impl["certificate"] for impl in self.implementations if self.picked.endswith(f"({impl['impl']})")), "")

    def summary(self) -> str:
        """``picked``, and the classes that stay with SGLang where others do not."""
        if len(self.left) == len(classes_of(self.op)):
            return self.picked
        by_reason: dict[str, list[str]] = {}
        for name, why in self.left.items():
            by_reason.setdefault(why, []).append(name)
        return "; ".join([self.picked, *(f"{', '.join(names)}: sglang ({why})" for why, names in by_reason.items())])


def operator_rows(manager: OpManager, settings: Settings, device: Device) -> list[OpRow]:
    """A row for each operator, under these settings and on this device."""
    manager.use(settings, device)
    policy = SelectionPolicy.from_settings(settings)
    operators = manager.registry.list_operators()
    checked = certificates(device.vendor, (impl for op in operators for impl in manager.registry.get_implementations(op)))
    return [_row(manager, settings, device, policy, op, checked) for op in operators]


def _row(manager: OpManager, settings: Settings, device: Device, policy: SelectionPolicy, op: str, checked: Certificates) -> OpRow:
    plan = manager.plan(op, policy)
    ordered = list(plan.candidates)
    rest = sorted((i for i in manager.registry.get_implementations(op) if i not in ordered), key=lambda i: i.impl_id)
    not_used = dict(plan.passed_over)
    implementations = []
    for impl in [*ordered, *rest]:
        unavailable = impl.why_unavailable(settings, device)
        why = unavailable or not_used.get(impl.impl_id) or ("" if impl in ordered else "not in the order")
        row = {"impl": impl.impl_id, "kind": impl.kind.value, "vendor": impl.vendor, "available": unavailable is None, "why": why}
        implementations.append({**row, "certificate": checked.get((op, impl.impl_id), NEVER)})
    stays = {name: settings.exclusion_reason(names_in_lists(name, op)) for name in classes_of(op)}
    left = {name: reason for name, reason in stays.items() if reason is not None}
    cannot_run = not plan.candidates and not plan.to_sglang and len(left) < len(classes_of(op))
    return OpRow(op, " | ".join(plan.order), str(settings.source_of_order(op)), _picked(plan, left), left, implementations, cannot_run)


def _picked(plan: Plan, left: dict[str, str]) -> str:
    if not classes_of(plan.op):
        return "none: this version of sglang-fl binds no SGLang layer to it"
    if len(left) == len(classes_of(plan.op)):
        return f"sglang ({', '.join(dict.fromkeys(left.values()))})"
    if plan.candidates:
        return str(plan.candidates[0])
    return "sglang" if plan.to_sglang else f"sglang (no implementation is available: {plan.describe()})"


def run(args: argparse.Namespace) -> int:
    if args.diff:
        return _diff(*args.diff, as_json=args.json)
    device = detect() if args.deep else probe()
    manager = get_default_manager()
    settings = check_settings(os.environ, device, manager)
    rows = operator_rows(manager, settings, device)
    layers = model_layers(args.model, {row.op: row.picked for row in rows}, settings) if args.model else None
    if args.json:
        data = {**_facts(settings, device), "operators": [asdict(row) for row in rows]}
        if layers is not None:
            data["layers"] = [asdict(layer) for layer in layers]
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return 0
    console = Console(markup=False, emoji=False)
    console.print(_operator_table(rows, f"Operators on {device.vendor} ({device.evidence})"))
    if not args.deep:
        console.print("Read from driver files and commands; --deep asks PyTorch, as a server does.", style="dim")
    if layers is None:
        classes = "; ".join(f"{op}: {', '.join(name for _, name in found)}" for op, found in LAYERS.items())
        console.print(f"Layer classes: {classes}", style="dim")
        console.print("Functions: " + ", ".join(name for _, name in FUNCTIONS.values()), style="dim")
        return 0
    no_layers = f"No layer of the model in {args.model} has an operator in sglang-fl."
    console.print(_layer_table(layers, f"Layers of {args.model}") if layers else no_layers)
    console.print(
        "Read from config.json and SGLang's source. Whether a layer is bound is decided when the model is loaded; see the server's log."
    )
    return 0


def _facts(settings: Settings, device: Device) -> dict[str, Any]:
    """What is known of this machine without a model, as a server says it of itself."""
    return {
        "device": device.vendor,
        "evidence": device.evidence,
        "profile": settings.platform,
        "versions": versions(),
        "settings": setting_facts(settings),
        "aten_functions": used_functions(settings, device),
        "aten_scope": settings.flagos_scope,
        "left_out": {},
    }


def used_functions(settings: Settings, device: Device) -> list[str]:
    """The FlagGems functions that replace ATen operators under these settings, where they can."""
    if not settings.use_flaggems or why_not_here(device) is not None:
        return []
    return sorted(function for function in flaggems_functions() or () if settings.flagos_exclusion_reason(function) is None)


def _diff(a: Path, b: Path, *, as_json: bool) -> int:
    """Exit code 1 if the two differ."""
    differences = compare(read(a), read(b))
    if as_json:
        print(json.dumps({"a": str(a), "b": str(b), "differences": [asdict(found) for found in differences]}, indent=2, ensure_ascii=False))
        return int(bool(differences))
    console = Console(markup=False, emoji=False)
    if not differences:
        console.print(f"{a} and {b} do the same.", soft_wrap=True)
        return 0
    table = _table(f"Differences: {len(differences)}", "what", str(a), str(b))
    for found in differences:
        absent = ABSENT[found.what]
        table.add_row(f"{found.what} {found.name}", absent if found.a is None else found.a, absent if found.b is None else found.b)
    console.print(table)
    return 1


def _table(title: str, name: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(name, min_width=_NAME_WIDTH, overflow="fold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _operator_table(rows: Sequence[OpRow], title: str) -> Table:
    table = _table(title, "operator", "implementations", "order in force (source)", "selected")
    for row in rows:
        implementations = "\n".join(map(_availability, row.implementations))
        table.add_row(row.op, implementations, f"{row.order}\n({row.order_from})", row.summary())
        table.add_section()
    return table


def _availability(impl: dict[str, Any]) -> str:
    if impl["available"]:
        return f"{impl['impl']}: available" + (f", not used: {impl['why']}" if impl["why"] else "") + f"; {impl['certificate']}"
    return f"{impl['impl']}: not available: {impl['why']}"


def _layer_table(layers: Sequence[LayerRow], title: str) -> Table:
    table = _table(title, "layer class", "operator", "size", "runs on")
    for layer in layers:
        table.add_row(layer.class_name, layer.op or "—", layer.size, layer.destination)
    return table
