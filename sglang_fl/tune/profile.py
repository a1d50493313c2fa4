# SPDX-License-Identifier: Apache-2.0
"""The profile: the decision on each operator and FlagGems function, with reason and figure."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..config.loader import MEASURED
from ..utils.files import rounded, write_whole
from ..utils.packages import source_hash
from .baseline import Baseline
from .bench import Choice
from .judge import BROKEN, FUNCTION, SLOWER_SERVED, USED, Candidate
from .outcome import Outcome

_HEAD = """\
# Written by sglang-fl tune. Do not edit; to measure again:
#     sglang-fl tune --update {name} MODEL
# {what}, on {chip}.
# Use it with SGLANG_FL_CONFIG={name}
"""


def write(path: Path, outcome: Outcome, baseline: Baseline) -> None:
    """Write the profile of an outcome.

    Args:
        baseline: an earlier profile, whose entries stay where they were not measured again. Until all are, so do its conditions.
    """
    with_ = outcome.about["conditions"]
    entries = {name: entry for name, entry in baseline.entries.items() if name in outcome.left}
    entries |= {name: entry for name, entry in _entries(outcome).items() if name not in outcome.left}
    packages = sorted({package for entry in entries.values() for package in entry.get("packages", ()) if package})
    sources = {package: source_hash(package) for package in packages}
    if outcome.incomplete and baseline.entries:
        with_ = {**baseline.measured["with"]}
        sources |= with_.get("sources", {})
    measured: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "with": {**with_, "sources": sources},
        "smallest_effect": rounded(outcome.noise),
        "us_of_a_step": rounded(outcome.step_us),
        "served": {case: rounded([found.ratio, found.low, found.high]) for case, found in outcome.served.items()},
    }
    if outcome.confirmed is not None:
        measured["confirmed"] = rounded(outcome.confirmed.speeds)
        measured["starts_differ_by"] = {
            "native": rounded(outcome.confirmed.apart),
            "tuned": rounded(outcome.confirmed.tuned_apart),
        }
    if outcome.incomplete:
        measured["incomplete"] = outcome.incomplete
    if outcome.why_native:
        measured["sglang_everywhere"] = outcome.why_native
    measured |= {"not_exercised": outcome.not_exercised, "entries": entries}
    head = _HEAD.format(name=path.name, what=outcome.about["conditions"]["model"].split()[0], chip=outcome.about["conditions"]["chip"])
    write_whole(path, as_text(head, values(outcome.used, outcome.about["scope"], measured)))


def values(choice: Choice, scope: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a profile. ``measured`` has the entries."""
    functions = {name.removeprefix(FUNCTION): entry["status"] for name, entry in sorted(measured["entries"].items()) if "impl" not in entry}
    found: dict[str, Any] = {"op_backends": choice.orders(), "flagos_faster": list(choice.functions)}
    for key, statuses in (("flagos_broken", BROKEN), ("flagos_slower", {SLOWER_SERVED})):
        if names := [name for name, status in functions.items() if status in statuses]:
            found[key] = names
    return {**found, "flagos_scope": scope, MEASURED: measured}


def as_text(head: str, values: Mapping[str, Any]) -> str:
    return head + yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=130, allow_unicode=True)


def _entries(outcome: Outcome) -> dict[str, Any]:
    """An entry for each operator and function, with the decision on each candidate."""
    found: dict[str, Any] = {}
    for candidate in outcome.candidates:
        if candidate.impl is None:
            found[candidate.entry] = {**_verdict(candidate), "packages": [*candidate.packages]}
            continue
        entry = found.setdefault(candidate.entry, {"impl": "sglang", "packages": [], "candidates": {}})
        entry["candidates"][candidate.impl] = _verdict(candidate)
        entry["packages"] = sorted({*entry["packages"], *candidate.packages})
        if candidate.status == USED:
            entry["impl"] = candidate.impl
    return found


def _verdict(candidate: Candidate) -> dict[str, Any]:
    found: dict[str, Any] = {"status": candidate.status, "reason": candidate.reason}
    if candidate.ratio is not None:
        found["time_ratio"] = rounded(candidate.ratio)
    if candidate.gains:
        found["us_saved_in_a_step"] = rounded(candidate.gains)
    if candidate.served:
        found["served"] = rounded(candidate.served)
    return found
