# SPDX-License-Identifier: Apache-2.0
"""The profile of a chip: the sum of the profiles of several models that were tuned on it."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import SettingsError
from .baseline import Baseline, read_baseline
from .bench import Choice
from .judge import BROKEN, FUNCTION, NOT_CALLED, OUTSIDE, SLOWER_SERVED, UNAVAILABLE, USED
from .profile import values


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """The keys of the sum. An implementation or function is used if each model that calls it uses it. All else is left to SGLang.

    Raises:
        SettingsError: a file is no profile of one model, uses what was not confirmed, or was measured with other versions or sources.
    """
    parts = dict(zip(labels(paths), map(_read, paths), strict=True))
    impls, functions, entries = {}, [], {}
    for name in sorted({name for part in parts.values() for name in part.entries}):
        mine = {label: part.entries[name] for label, part in parts.items() if name in part.entries}
        entry: dict[str, Any] = {}
        if any("impl" in one for one in mine.values()):
            entry["impl"] = _implementation(mine.values())
            if entry["impl"] != "sglang":
                impls[name] = entry["impl"]
        else:
            entry["status"] = _worst([one["status"] for one in mine.values()])
            if entry["status"] == USED:
                functions.append(name.removeprefix(FUNCTION))
        entry["packages"] = sorted({package for one in mine.values() for package in one.get("packages", ())})
        entry["models"] = {label: {key: value for key, value in one.items() if key != "packages"} for label, one in mine.items()}
        entries[name] = entry
    models = {label: {key: value for key, value in part.measured.items() if key != "entries"} for label, part in parts.items()}
    scope = "graphs" if "graphs" in {part.scope for part in parts.values()} else "everywhere"
    return values(Choice.of(impls, functions), scope, {"with": _with(parts), "models": models, "entries": entries})


def labels(paths: Sequence[Path]) -> list[str]:
    """A name for each profile: its file's, or its folder's where several files have the same name. Raises SettingsError."""
    files = Counter(path.stem for path in paths)
    found = [path.stem if files[path.stem] == 1 else Path(os.path.abspath(path)).parent.name for path in paths]
    for label, count in Counter(found).items():
        if count > 1:
            same = ", ".join(str(path) for path, other in zip(paths, found, strict=True) if other == label)
            raise SettingsError(f"--merge: two of the profiles have the same name: {same}: rename one")
    return found


def _read(path: Path) -> Baseline:
    part = read_baseline(path, "--merge")
    if not part.is_confirmed:
        raise SettingsError(f"--merge {path}: its choice was not confirmed on fresh starts: finish the run with --resume")
    return part


def _implementation(entries: Iterable[Mapping[str, Any]]) -> str:
    """What all models use that call the operator, or ``sglang``."""
    calling = [entry for entry in entries if {one["status"] for one in entry["candidates"].values()} - {NOT_CALLED, UNAVAILABLE}]
    used = {str(entry["impl"]) for entry in calling}
    return used.pop() if len(used) == 1 else "sglang"


def _worst(statuses: Sequence[str]) -> str:
    """What holds on the chip: the first of wrong, slower when served, all else, used.

    A model that calls a function only outside of graphs does not use it there, whatever it is.
    """
    return min(statuses, key=lambda status: (status == OUTSIDE, status == USED, status not in BROKEN, status != SLOWER_SERVED, status))


def _with(parts: Mapping[str, Baseline]) -> dict[str, dict[str, str]]:
    """The versions and sources, which must be the same."""
    found: dict[str, dict[str, str]] = {"versions": {}, "sources": {}}
    for label, part in parts.items():
        for kind, of in found.items():
            for name, value in part.measured["with"].get(kind, {}).items():
                if of.setdefault(name, value) != value:
                    raise SettingsError(f"--merge: {label} was measured with {name} {value}, another with {of[name]}: update one of them")
    return found
