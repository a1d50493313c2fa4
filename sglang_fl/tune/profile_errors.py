# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a profile that someone has edited."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config.loader import MEASURED
from ..config.yaml_file import Entry
from ..utils.suggest import suggest
from .judge import FUNCTION


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def wrong_settings(path: Path, keys: Mapping[Any, Entry]) -> Iterator[str]:
    """The keys of settings whose values tune does not write, and ``models`` of ``measured``, with their lines."""
    for name, (expected, fits) in _SETTINGS.items():
        if name in keys and not fits(keys[name].value):
            yield f"{path}:{keys[name].line}: {name}: expected {expected}, found {keys[name].value!r}"
    measured = keys[MEASURED].value if MEASURED in keys else None
    if isinstance(measured, dict) and not isinstance(models := measured.get("models", {}), dict):
        yield f"{path}:{keys[MEASURED].item_lines['models']}: {MEASURED}: models: expected names with a value each, found {models!r}"
    if "op_backends" not in keys or not isinstance(keys["op_backends"].value, dict):
        return
    for op, order in keys["op_backends"].value.items():
        if not (isinstance(op, str) and order and _are_names(order)):
            line = keys["op_backends"].item_lines[op]
            yield f"{path}:{line}: op_backends: {op}: expected a list of names, such as [sglang], found {order!r}"


#: Key -> what it must be, and whether a value is so.
_SETTINGS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "op_backends": ("operators with a list of names each", lambda value: isinstance(value, dict)),
    "flagos_faster": ("a list of names", lambda value: value is None or _are_names(value)),
    "flagos_scope": ("graphs or everywhere", lambda value: value in (None, "graphs", "everywhere")),
}


def wrong_entries(measured: Mapping[str, Any]) -> Iterator[str]:
    """The values of ``measured`` that tune does not write. It has the mappings ``with`` and ``entries``."""
    for name in ("versions", "sources"):
        if not isinstance(found := measured["with"].get(name, {}), dict):
            yield f"with: {name}: expected names with a value each, found {found!r}"
    for name, entry in measured["entries"].items():
        where = f"entries: {name}"
        if not isinstance(name, str) or not isinstance(entry, dict):
            yield f"{where}: expected keys with a value each, found {entry!r}"
            continue
        if not _are_names(packages := entry.get("packages", [])):
            yield f"{where}: packages: expected a list of names, found {packages!r}"
        if name.startswith(FUNCTION):
            yield from _missing(where, entry, "status", str)
            continue
        yield from _missing(where, entry, "impl", str)
        yield from _missing(where, entry, "candidates", dict)
        candidates = entry.get("candidates")
        for impl, verdict in candidates.items() if isinstance(candidates, dict) else ():
            yield from _missing(f"{where}: candidates: {impl}", verdict, "status", str)


def _missing(where: str, found: Any, name: str, kind: type) -> Iterator[str]:
    """What is wrong, if a mapping has no such value."""
    if not isinstance(found, dict):
        yield f"{where}: expected keys with a value each, found {found!r}"
    elif name not in found:
        yield f"{where}: it has no {name!r}{_misspelt(name, found)}"
    elif not isinstance(found[name], kind):
        yield f"{where}: {name}: expected {'a text' if kind is str else 'keys with a value each'}, found {found[name]!r}"


def _misspelt(name: str, found: Mapping[Any, Any]) -> str:
    """The key that is nearly this name."""
    near = [key for key in found if isinstance(key, str) and suggest(key, [name]).startswith("; did")]
    return f" but {near[0]!r}" if near else ""
