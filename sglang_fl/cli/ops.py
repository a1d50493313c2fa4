# SPDX-License-Identifier: Apache-2.0
"""Show every operator's implementations, the order in force, and which one is selected."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich import box
from rich.console import Console

from ..check.certificates import NEVER, Certificates, certificates
from ..config import Settings, SettingsError
from ..device import Device, detect, probe
from ..dispatch.catalog import FUNCTIONS, LAYERS, classes_of, names_in_lists
from ..dispatch.kernel_implementations import exclusion_reason as kernel_exclusion
from ..dispatch.kernel_implementations import is_kernel
from ..dispatch.manager import OpManager, Plan, get_default_manager
from ..dispatch.policy import SelectionPolicy
from ..dispatch.types import OpImpl, match_token, trial_name
from ..fingerprint import compare, machine_facts, read
from ..fingerprint.compare import ABSENT
from ..startup import check_settings
from ..startup.words import used_functions
from ..trial import environment, record_path, settled_record
from ..utils.tables import table
from .model_layers import LayerRow, model_layers

#: What stands at an operator that no layer of SGLang calls.
_NOT_CALLED = "none (SGLang does not call it)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="show every implementation, available or not, and SGLang's classes")
    parser.add_argument("--model", type=Path, metavar="DIR", help="show the layers of the model whose config.json is in DIR")
    parser.add_argument("--deep", action="store_true", help="detect the device with PyTorch, as a server does")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--diff",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="compare two hosts; each of A and B is a file with the output of --json, or a server's log",
    )


@dataclass(frozen=True)
class OpRow:
    """An operator: its implementations, their order, and the one that is selected.

    Attributes:
        picked: what its layers run on, before their trial.
        left: layer class -> why it stays with SGLang nevertheless.
        missed: implementation, or word of the order that names one -> why it is not used, of those before the one that is picked.
        cannot_run: no implementation in the order in force is available here, and ``sglang`` is not in it.
    """

    op: str
    order: str
    order_from: str
    picked: str
    left: dict[str, str]
    missed: dict[str, str]
    implementations: list[dict[str, Any]]
    cannot_run: bool

    @property
    def selected(self) -> dict[str, Any]:
        """Of ``implementations`` the one that is picked; empty if none is."""
        return next((impl for impl in self.implementations if self.picked == f"{impl['kind']}({impl['impl']})"), {})

    @property
    def certificate(self) -> str:
        """The last result of ``sglang-fl check`` for the implementation that is picked; empty if none is."""
        return str(self.selected.get("certificate", ""))

    def summary(self) -> str:
        """``picked``, and the classes that stay with SGLang where others do not."""
        if len(self.left) == len(classes_of(self.op)):
            return self.picked
        return "; ".join([self.picked, *(f"{', '.join(names)}: sglang ({why})" for why, names in _by_reason([self.left]).items())])


def operator_rows(
    manager: OpManager, settings: Settings, device: Device, excluded: Mapping[str, str] = MappingProxyType({})
) -> list[OpRow]:
    """A row for each operator, and for each kernel of SGLang's that something else can run, under these settings and on this device.

    Args:
        excluded: what ended an earlier start, see :func:`left_out_here`.
    """
    manager.use(settings, device)
    policy = SelectionPolicy.from_settings(settings)
    impls = {op: manager.registry.get_implementations(op) for op in manager.registry.list_operators()}
    operators = [op for op in impls if not is_kernel(op) or any(impl.is_available(settings, device) for impl in impls[op])]
    checked = certificates(device.vendor, (impl for op in operators for impl in impls[op]))
    return [_row(manager, settings, device, policy, op, checked, excluded) for op in operators]


def _row(
    manager: OpManager,
    settings: Settings,
    device: Device,
    policy: SelectionPolicy,
    op: str,
    checked: Certificates,
    excluded: Mapping[str, str],
) -> OpRow:
    plan = manager.plan(op, policy)
    ended = {
        impl.impl_id: f"it ended an earlier start: {excluded[name]}" for impl in plan.candidates if (name := trial_name(impl)) in excluded
    }
    if ended:
        candidates = tuple(impl for impl in plan.candidates if impl.impl_id not in ended)
        plan = replace(plan, candidates=candidates, passed_over=(*plan.passed_over, *ended.items()))
    ordered = list(plan.candidates)
    rest = sorted((i for i in manager.registry.get_implementations(op) if i not in ordered), key=lambda i: i.impl_id)
    not_used = dict(plan.passed_over)
    implementations = []
    for impl in [*ordered, *rest]:
        unavailable = impl.why_unavailable(settings, device)
        why = unavailable or not_used.get(impl.impl_id) or ("" if impl in ordered else "not in the order")
        row = {"impl": impl.impl_id, "kind": impl.kind.value, "vendor": impl.vendor, "available": unavailable is None, "why": why}
        implementations.append({**row, "certificate": checked.get((op, impl.impl_id), NEVER)})
    stays = {name: _exclusion_reason(settings, op, name) for name in classes_of(op)}
    left = {name: reason for name, reason in stays.items() if reason is not None}
    cannot_run = not plan.candidates and not plan.to_sglang and len(left) < len(classes_of(op))
    picked = _picked(plan, left)
    missed = {} if not classes_of(op) or len(left) == len(classes_of(op)) else _missed(plan, [*ordered, *rest])
    return OpRow(op, " | ".join(plan.order), str(settings.source_of_order(op)), picked, left, missed, implementations, cannot_run)


def _missed(plan: Plan, impls: Sequence[OpImpl]) -> dict[str, str]:
    """What stands in the order before the implementation that is picked, and why it is not used."""
    by_id = {impl.impl_id: impl for impl in impls}
    found = {}
    for token in plan.order:
        if any(match_token(impl, token) for impl in plan.candidates[:1]):
            break
        for what, why in plan.passed_over:
            if match_token(by_id[what], token) if what in by_id else what == token and ":" in token:
                found[what] = why
    return found


def _exclusion_reason(settings: Settings, op: str, name: str) -> str | None:
    return kernel_exclusion(settings, op) if is_kernel(op) else settings.exclusion_reason(names_in_lists(name, op))


def _picked(plan: Plan, left: dict[str, str]) -> str:
    if not classes_of(plan.op):
        return _NOT_CALLED
    if len(left) == len(classes_of(plan.op)):
        return f"sglang ({', '.join(dict.fromkeys(left.values()))})"
    if plan.candidates:
        return str(plan.candidates[0])
    return "sglang" if plan.to_sglang else f"sglang (no implementation is available: {plan.describe()})"


def run(args: argparse.Namespace) -> int:
    if args.diff:
        if ignored := [f"--{name}" for name in ("all", "model", "deep") if getattr(args, name)]:
            raise SettingsError(f"ops --diff compares two files; {' and '.join(ignored)} do{'' if ignored[1:] else 'es'} not go with it")
        return _diff(*args.diff, as_json=args.json)
    device = detect() if args.deep else probe()
    manager = get_default_manager()
    settings = check_settings(os.environ, device, manager)
    left_out = left_out_here(settings, device)
    rows = operator_rows(manager, settings, device, left_out)
    layers = model_layers(args.model, {row.op: row.picked for row in rows}, settings) if args.model else None
    if args.json:
        data = {**_facts(settings, device, left_out), "operators": [asdict(row) for row in rows]}
        if layers is not None:
            data["layers"] = [asdict(layer) for layer in layers]
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return 0
    console = Console(markup=False, emoji=False)
    console.print(f"Operators on {device.vendor} ({device.evidence})", soft_wrap=True)
    print_operators(console, rows)
    if args.all:
        _print_everything(console, rows)
    if layers is not None:
        _print_layers(console, layers, args.model)
        console.print("Read from config.json and SGLang's source. Whether a layer is bound is decided at load time: see the server's log.")
    if not args.deep:
        console.print("Device: from driver files and commands; --deep asks PyTorch, as a server does.", style="dim")
    return 0


def _facts(settings: Settings, device: Device, left_out: dict[str, str]) -> dict[str, Any]:
    """The facts of this machine without a model, in the form of a server's own."""
    return {
        **machine_facts(settings, device),
        "aten_functions": used_functions(settings, device),
        "aten_scope": settings.flagos_scope,
        "left_out": left_out,
    }


def left_out_here(settings: Settings, device: Device) -> dict[str, str]:
    """What a start on this chip leaves out, since it ended an earlier one: name -> what happened."""
    try:
        record = settled_record(record_path(settings))
    except SettingsError:  # there is no place for it, as doctor says: a server starts without
        return {}
    return {
        name: str(death)
        for bound_to, names in record.items()
        if bound_to.startswith(f"{environment(device.vendor)} ")
        for name, death in names.items()
        if death.excludes and (":" in name or (settings.use_flaggems and settings.flagos_exclusion_reason(name) is None))
    }


def _diff(a: Path, b: Path, *, as_json: bool) -> int:
    """Exit code 1 if the two differ."""
    differences = compare(read(a), read(b))
    if as_json:
        print(json.dumps({"a": str(a), "b": str(b), "differences": [asdict(found) for found in differences]}, indent=2, ensure_ascii=False))
        return int(bool(differences))
    console = Console(markup=False, emoji=False)
    if not differences:
        console.print(f"No differences between {a} and {b}.", soft_wrap=True)
        return 0
    rows = table(f"Differences: {len(differences)}", "what", str(a), str(b), box=box.SIMPLE)
    for found in differences:
        absent = ABSENT[found.what]
        rows.add_row(f"{found.what} {found.name}", absent if found.a is None else found.a, absent if found.b is None else found.b)
    console.print(rows)
    return 1


def print_operators(console: Console, rows: Sequence[OpRow]) -> None:
    """One line an operator. Above: the orders. Below: what stays with SGLang, what is not available, and a count of kernels."""
    kernels = [row for row in rows if is_kernel(row.op)]
    replaced = [row for row in rows if is_kernel(row.op) and row.selected.get("vendor")]
    rows = [row for row in rows if not is_kernel(row.op)]
    orders: dict[str, list[str]] = {}
    for row in rows:
        orders.setdefault(f"{row.order} ({row.order_from})", []).append(row.op)
    by_count = sorted(orders, key=lambda order: -len(orders[order]))
    for order in by_count:
        console.print(f"Order{'' if order == by_count[0] else ' of ' + ', '.join(orders[order])}: {order}", soft_wrap=True)
    shown = table("", "operator", "runs on", "checked", box=box.SIMPLE)
    for row in rows:
        checked = row.certificate.partition(", ")[0].replace(NEVER, "never")
        shown.add_row(row.op, row.selected.get("impl", row.picked), checked)
    console.print(shown)
    for why, names in _by_reason([row.left for row in rows]).items():
        console.print(f"Stays with SGLang ({why}): {', '.join(names)}")
    for why, names in _by_reason([row.missed for row in rows]).items():
        ops = [row.op for row in rows if not row.missed.keys().isdisjoint(names)]
        console.print(f"Not available: {', '.join(names)} for {', '.join(ops)}: {why}")
    for row in replaced:
        console.print(f"{row.op} → {row.selected['impl']} ({row.certificate.partition(', ')[0]})", soft_wrap=True)
    if kernels:
        console.print(
            f"SGLang's own kernels: {'; '.join(filter(None, kernels_in_words(kernels)))}; 'sglang-fl ops --all' lists them", soft_wrap=True
        )


def kernels_in_words(rows: Sequence[OpRow]) -> tuple[str, str]:
    """How many of SGLang's kernels run on each implementation, and how many have each result of the last check."""
    where = Counter(row.selected.get("impl", row.picked) for row in rows)
    checked = Counter(row.certificate if row.certificate == NEVER else row.certificate.split()[0] for row in rows if row.certificate)
    return ", ".join(f"{count} on {name}" for name, count in where.most_common()), ", ".join(
        f"{n} {word}" for word, n in checked.most_common()
    )


def _by_reason(reasons: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """The names that have a reason, each once, by reason."""
    found: dict[str, list[str]] = {}
    for name, why in {pair: None for some in reasons for pair in some.items()}:
        found.setdefault(why, []).append(name)
    return found


def _print_everything(console: Console, rows: Sequence[OpRow]) -> None:
    shown = table("Implementations", "operator", "implementation", "state", "checked", box=box.SIMPLE)
    for row in rows:
        for i, impl in enumerate(row.implementations):
            state = "available" if impl["available"] else f"not available: {impl['why']}"
            state += f", not used: {impl['why']}" if impl["available"] and impl["why"] else ""
            shown.add_row("" if i else row.op, impl["impl"], state, impl["certificate"] if impl["available"] else "")
    console.print(shown)
    for op, found in LAYERS.items():
        console.print(f"Layer classes of {op}: {', '.join(name for _, name in found)}")
    console.print("Functions: " + ", ".join(name for _, name in FUNCTIONS.values()))


def _print_layers(console: Console, layers: Sequence[LayerRow], model: Path) -> None:
    shown = table(f"Layers of {model}", "layer class", "operator", "size", "runs on", box=box.SIMPLE)
    for layer in layers:
        shown.add_row(layer.class_name, layer.op or "—", layer.size, layer.destination)
    console.print(shown if layers else f"No layer of the model in {model} has an operator in sglang-fl.")
