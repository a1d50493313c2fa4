# SPDX-License-Identifier: Apache-2.0
"""Show the platform, versions, what each operator runs on, and problems with their remedies."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from ...device import probe
from ...dispatch.manager import get_default_manager
from ...startup import check_names
from ...trial import forget, record_path
from ...utils.tables import table
from ..ops import print_operators
from .diagnosis import Diagnosis, diagnose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also import SGLang: ask PyTorch for the device, check SGLang's interfaces, replace the ATen operators and list them",
    )
    parser.add_argument(
        "--forget",
        action="store_true",
        help="delete the record of crashes and hangs in earlier starts, so that the next start tries everything again",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.forget:
        path = record_path(check_names(os.environ, probe(), get_default_manager()))
        try:
            removed = forget(path)
        except OSError as error:
            print(f"sglang-fl: the record of trials {path} cannot be removed: {error.strerror or error}", file=sys.stderr)
            return 1
        print(f"{path}: {'removed' if removed else 'nothing to remove'}")
        return 0
    found = diagnose(os.environ, deep=args.deep)
    if args.json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        _print(found)
    return 1 if any(problem.fatal for problem in found.problems) else 0


def _print(found: Diagnosis) -> None:
    console = Console(markup=False, emoji=False)
    facts = {name: value or "not installed" for name, value in {**found.device, **found.versions}.items()}
    console.print(_two_columns("Platform and versions", facts))
    if found.layers:
        aten, *_, collectives = found.layers
        if found.aten is None:
            console.print(f"ATen operators: {aten['state']} ({aten['why']})", soft_wrap=True)
        console.print(f"Collectives: {collectives['state']} ({collectives['why']})", soft_wrap=True)
        print_operators(console, found.operators)
    if found.aten is not None:
        _print_aten(console, found.aten)
    backends = (name.removeprefix("sglang_fl.dispatch.backends.") for name in found.backends)
    console.print(f"Backends: {', '.join(backends) or 'none'}")
    if found.platforms:
        console.print(f"Platforms of installed packages: {'; '.join(found.platforms)}", soft_wrap=True)
    for bound_to, deaths in found.trials.get("deaths", {}).items():
        console.print(_two_columns(f"Excluded from starts with {bound_to}: an earlier start crashed or hung in its first run", deaths))
    if found.trials.get("deaths"):
        console.print(f"'sglang-fl doctor --forget' removes that record, {found.trials['record']}", soft_wrap=True)
    if found.changes:
        console.print(f"Changes to SGLang: {'; '.join(found.changes)}", soft_wrap=True)
    console.print(f"Start a server with: {found.start}", soft_wrap=True)
    if found.not_looked_at:
        console.print(f"Not looked at: {found.not_looked_at}", soft_wrap=True)
    if not found.problems:
        console.print("No problems found.")
    for problem in found.problems:
        console.print(f"{'ERROR' if problem.fatal else 'warning'}: {problem.what}", soft_wrap=True)
        console.print(f"  → {problem.remedy}", soft_wrap=True)


def _print_aten(console: Console, aten: dict[str, Any]) -> None:
    if aten["off"] is not None:
        console.print(f"ATen operators: none replaced: {aten['off']}", soft_wrap=True)
        return
    rows = {f"replaced by FlagGems ({len(aten['replaced'])})": ", ".join(aten["replaced"])}
    rows |= {f"left to PyTorch: {why} ({len(names)} functions)": ", ".join(names) for why, names in aten["left_by_reason"].items()}
    console.print(_two_columns("ATen operators", rows))


def _two_columns(title: str, rows: Mapping[str, str]) -> Table:
    shown = table(title, "", "", show_header=False)
    for name, value in rows.items():
        shown.add_row(name, value)
    return shown
