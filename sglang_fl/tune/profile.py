# SPDX-License-Identifier: Apache-2.0
"""The profile: the decision on each operator and FlagGems function, with reason and figure."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..config import SettingsError
from ..config.loader import MEASURED
from ..config.yaml_file import read_mapping
from ..dispatch.ops import OPERATORS
from ..fingerprint.measured import measured_in
from ..utils.packages import source_hash
from .bench import Choice
from .judge import BROKEN, SLOWER_SERVED, USED, Candidate
from .tuning import Outcome

_HEAD = """\
# Written by sglang-fl tune. Do not edit; to measure again:
#     sglang-fl tune --update {name} MODEL
# {what}, on {chip}.
# Use it with SGLANG_FL_CONFIG={name}
"""


def write(path: Path, outcome: Outcome, kept: Mapping[str, Any]) -> None:
    """Write the profile atomically.

    Args:
        kept: the entries of an earlier profile that were not measured again.
    """
    with_ = outcome.about["conditions"]
    entries = {**kept, **_entries(outcome)}
    orders = {op: ["sglang"] for op in sorted({*OPERATORS, *outcome.about["implementations"]})}
    orders |= {op: [f"impl:{impl}", "sglang"] for op, impl in outcome.used.impls}
    functions = {name: entry["status"] for name, entry in sorted(entries.items()) if "impl" not in entry}
    packages = sorted({package for entry in entries.values() for package in entry.get("packages", ()) if package})
    body: dict[str, Any] = {"op_backends": orders, "flagos_faster": list(outcome.used.functions)}
    for key, statuses in (("flagos_broken", BROKEN), ("flagos_slower", {SLOWER_SERVED})):
        if names := [name for name, status in functions.items() if status in statuses]:
            body[key] = names
    body["flagos_scope"] = outcome.about["scope"]
    measured: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "with": {**with_, "sources": {package: source_hash(package) for package in packages}},
        "smallest_effect": _rounded(outcome.noise),
        "served": {case: _rounded([found.ratio, found.low, found.high]) for case, found in outcome.served.items()},
    }
    if outcome.confirmed is not None:
        measured["confirmed"] = {case: _rounded(ratio) for case, ratio in outcome.confirmed.speeds.items()}
    if outcome.incomplete:
        measured["incomplete"] = outcome.incomplete
    if outcome.why_native:
        measured["sglang_everywhere"] = outcome.why_native
    measured |= {"not_exercised": outcome.not_exercised, "entries": entries}
    head = _HEAD.format(name=path.name, what=with_["model"].split()[0], chip=with_["chip"])
    text = head + yaml.safe_dump({**body, MEASURED: measured}, sort_keys=False, default_flow_style=None, width=130, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _entries(outcome: Outcome) -> dict[str, Any]:
    """An entry for each operator and function, with the decision on each candidate."""
    found: dict[str, Any] = {}
    for candidate in outcome.candidates:
        if candidate.impl is None:
            found[candidate.name] = {**_verdict(candidate), "packages": [candidate.package]}
            continue
        entry = found.setdefault(candidate.name, {"impl": "sglang", "packages": [], "candidates": {}})
        entry["candidates"][candidate.impl] = _verdict(candidate)
        entry["packages"] = sorted({*entry["packages"], candidate.package})
        if candidate.status == USED:
            entry["impl"] = candidate.impl
    return found


def _verdict(candidate: Candidate) -> dict[str, Any]:
    found: dict[str, Any] = {"status": candidate.status, "reason": candidate.reason}
    if candidate.ratio is not None:
        found["time_ratio"] = _rounded(list(candidate.ratio))
    if candidate.gains:
        found["us_saved_in_a_step"] = _rounded(candidate.gains)
    if candidate.served:
        found["served"] = {case: _rounded(list(speed)) for case, speed in candidate.served.items()}
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value]


def choice_in(path: Path) -> tuple[Choice, dict[str, Any]]:
    """The choice in a profile written by tune, and its ``measured``.

    Raises:
        SettingsError: it cannot be read, or has no ``measured``.
    """
    measured = measured_in(path)
    if measured is None or not isinstance(measured.get("entries"), dict):
        raise SettingsError(f"--update {path}: it has no '{MEASURED}' with entries, so it was not written by sglang-fl tune")
    values = {key: entry.value for key, entry in read_mapping(path, what="--update", problems=[]).items()}
    impls = {op: order[0].removeprefix("impl:") for op, order in values.get("op_backends", {}).items() if order[0].startswith("impl:")}
    return Choice.of(impls, values.get("flagos_faster") or []), dict(measured)
