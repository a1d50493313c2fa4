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


@dataclass(frozen=True)
class Baseline:
    """An earlier profile, and which of its entries are measured again. An empty one: everything is measured.

    Attributes:
        choice: its choice.
        measured: its ``measured``.
        only: the names to measure. None: all.
        new_functions: whether FlagGems functions without an entry are measured too.
    """

    choice: Choice = NATIVE
    measured: Mapping[str, Any] = field(default_factory=dict)
    only: frozenset[str] | None = None
    new_functions: bool = False

    @property
    def entries(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.measured.get("entries", {})
        return found

    def measures(self, name: str, impl: str | None) -> bool:
        """Whether a candidate is measured."""
        return self.only is None or name in self.only or (impl is None and self.new_functions and name not in self.entries)

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

    def with_new(self, about: Mapping[str, Any]) -> list[str]:
        """The operators with implementations that it does not mention."""
        return [
            op
            for op, rows in about["implementations"].items()
            if any(row["impl"] not in self.entries.get(op, {}).get("candidates", {}) and row["why_not"] is None for row in rows)
        ]


def read_baseline(path: Path) -> Baseline:
    """A profile that was written by tune.

    Raises:
        SettingsError: it cannot be read, or has no entries that were measured.
    """
    values = {key: entry.value for key, entry in read_mapping(path, what="--update", problems=[]).items()}
    measured = values.get(MEASURED)
    if not isinstance(measured, dict) or not all(isinstance(measured.get(key), dict) for key in ("with", "entries")):
        raise SettingsError(f"--update {path}: it has no '{MEASURED}' with conditions and entries, so it was not written by sglang-fl tune")
    impls = {op: order[0].removeprefix("impl:") for op, order in values.get("op_backends", {}).items() if order[0].startswith("impl:")}
    return Baseline(Choice.of(impls, values.get("flagos_faster") or []), measured)
