# SPDX-License-Identifier: Apache-2.0
"""The profile that ``--update`` begins with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import SettingsError
from ..config.loader import MEASURED
from ..config.yaml_file import read_mapping
from ..fingerprint.measured import Change, changes
from .bench import NATIVE, Choice
from .judge import FUNCTION, NOT_MEASURED, UNAVAILABLE, UNDECIDED
from .profile_errors import wrong_entries, wrong_settings

#: Statuses of what has no decision.
_OPEN = frozenset({UNDECIDED, NOT_MEASURED})


@dataclass(frozen=True)
class Baseline:
    """An earlier profile, and which of its entries are measured again. An empty one: everything is measured.

    Attributes:
        choice: its choice.
        measured: its ``measured``.
        only: the entries to measure. None: all.
        new_functions: whether FlagGems functions without an entry are measured too.
        scope: where its FlagGems functions are in force.
    """

    choice: Choice = NATIVE
    measured: Mapping[str, Any] = field(default_factory=dict)
    only: frozenset[str] | None = None
    new_functions: bool = False
    scope: str = "everywhere"

    @property
    def entries(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.measured.get("entries", {})
        return found

    def measures(self, entry: str) -> bool:
        """Whether an entry's candidates are measured."""
        is_new = entry.startswith(FUNCTION) and entry not in self.entries
        return self.only is None or entry in self.only or (is_new and self.new_functions)

    def changes(self, about: Mapping[str, Any]) -> list[Change]:
        """What has changed since. Raises SettingsError if it is the profile of another model."""
        found = changes(self.measured, about["conditions"])
        for change in found:
            if change.what == "model":
                raise SettingsError(f"--update: the profile is of {change.then}, not of {change.now}: tune this model without --update")
        return found

    def gone(self, about: Mapping[str, Any]) -> dict[str, str]:
        """Operator -> why its choice cannot be kept."""
        here = {(op, row["impl"]) for op, rows in about["implementations"].items() for row in rows}
        return {op: f"the model has no {op} with {impl} any more" for op, impl in self.choice.impls if (op, impl) not in here}

    def not_measured(self, about: Mapping[str, Any]) -> list[str]:
        """The entries that are undecided, and the operators with implementations that were not available."""
        found = {name for name, entry in self.entries.items() if _OPEN & {one.get("status") for one in _verdicts(entry)}}
        for op, rows in about["implementations"].items():
            of = self.entries.get(op, {}).get("candidates", {})
            if any(row["why_not"] is None and of.get(row["impl"], {}).get("status", UNAVAILABLE) == UNAVAILABLE for row in rows):
                found.add(op)
        return sorted(found)

    @property
    def is_confirmed(self) -> bool:
        """Whether its choice was measured on fresh starts."""
        return self.choice == NATIVE or "confirmed" in self.measured


def _verdicts(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A function's, or those of an operator's candidates."""
    return [*entry["candidates"].values()] if "candidates" in entry else [entry]


def read_baseline(path: Path, option: str) -> Baseline:
    """A profile that was written by tune for a model. ``option`` is that which names it.

    Raises:
        SettingsError: it cannot be read, has no entries that were measured or values that tune does not write, or is the sum of several.
    """
    problems: list[str] = []
    keys = read_mapping(path, what=option, problems=problems)
    if problems := [*problems, *wrong_settings(path, keys)]:
        raise SettingsError(problems)
    values = {key: entry.value for key, entry in keys.items()}
    measured = values.get(MEASURED)
    if not isinstance(measured, dict) or not all(isinstance(measured.get(key), dict) for key in ("with", "entries")):
        raise SettingsError(f"{option} {path}: it has no '{MEASURED}' with conditions and entries, so it was not written by sglang-fl tune")
    if "models" in measured:
        raise SettingsError(f"{option} {path}: it is the sum of several profiles ({', '.join(measured['models'])}): give one of these")
    if problems := [f"{option} {path}: {MEASURED}: {problem}" for problem in wrong_entries(measured)]:
        raise SettingsError(problems)
    impls = {op: order[0].removeprefix("impl:") for op, order in values.get("op_backends", {}).items() if order[0].startswith("impl:")}
    return Baseline(Choice.of(impls, values.get("flagos_faster") or []), measured, scope=values.get("flagos_scope") or "everywhere")
