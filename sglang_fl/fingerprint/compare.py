# SPDX-License-Identifier: Apache-2.0
"""Compares two servers, or two machines."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import SettingsError

#: The text before a fingerprint and its facts in a server's log.
MARK = "sglang-fl: fingerprint "
#: In a log, the key of the time when the process started. Logs of earlier versions do not have it.
STARTED = "started"
_TYPES = {"device": str, "evidence": str, "profile": str, "versions": dict, "settings": dict, "operators": list, "aten_functions": list}
_TYPES |= {"aten_scope": str, "left_out": dict}
#: What is compared, causes first, and the text for a side that does not have it.
ABSENT = {
    "model": "not served",
    "device": "none",
    "version": "not installed",
    "setting": "not set",
    "operator": "not in its model",
    "FlagGems function": "PyTorch's own is used",
    "left out": "not left out",
}
_ORDER = list(ABSENT)


@dataclass(frozen=True)
class Difference:
    """One difference. None: that side does not have it."""

    what: str
    name: str
    a: str | None
    b: str | None


def read(path: Path) -> list[dict[str, Any]]:
    """The facts in a file: the output of ``sglang-fl ops --json``, or a server's log, which has them for each model.

    Of a log that has several starts, those of the last. A start's models are in the order in which they were loaded, so a draft comes
    after its target.

    Raises:
        SettingsError: the file cannot be read, or has none.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig", errors="replace")
    except (OSError, RuntimeError) as error:
        raise SettingsError(f"--diff: {str(path)!r} cannot be read: {error}") from None
    found: list[tuple[str | None, dict[str, Any]]] = []
    for line in [text] if MARK not in text else [line.partition(MARK)[2].partition(": ")[2] for line in text.splitlines() if MARK in line]:
        try:
            facts = json.loads(line)
        except ValueError:
            continue  # a truncated line
        if _is_facts(facts):
            found.append((facts.pop(STARTED, None), facts))
    if not found:
        message = f"--diff: {str(path)!r} is neither what 'sglang-fl ops --json' prints nor a server's log with a line {MARK.strip()!r}"
        raise SettingsError(message)
    last_start, _ = found[-1]
    return list({facts.get("model", ""): facts for started, facts in found if started == last_start}.values())


def _is_facts(data: Any) -> bool:
    if not isinstance(data, dict) or not all(isinstance(data.get(key), kind) for key, kind in _TYPES.items()):
        return False
    kinds_of_rows = ((data["settings"].values(), {"value", "source"}), (data["operators"], {"op", "picked"}))
    return all(isinstance(row, dict) and keys <= row.keys() for rows, keys in kinds_of_rows for row in rows)


def compare(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[Difference]:
    """The differences between two files' facts, see :func:`read`."""
    rows_a, rows_b = dict(_rows(a)), dict(_rows(b))
    names = rows_a.keys() | rows_b.keys()
    if ("model" in a[0]) != ("model" in b[0]):
        # A server knows its model's operators and PyTorch. The command line knows all operators and no model.
        one_sided = {name for name in names if name not in rows_a or name not in rows_b}
        names -= {name for name in one_sided if name[0] in ("model", "operator")} | {("device", "found by")}
    ordered = sorted(names, key=lambda name: (_ORDER.index(name[0]), name[1]))
    found = [(name, rows_a.get(name, (None, None)), rows_b.get(name, (None, None))) for name in ordered]
    return [Difference(*name, text_a, text_b) for name, (value_a, text_a), (value_b, text_b) in found if value_a != value_b]


def _rows(models: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, str], tuple[Any, str]]]:
    """((what, name), (what is compared, what is shown)) of each fact."""
    facts = models[-1]
    yield ("device", "vendor"), (facts["device"], facts["device"])
    yield ("device", "found by"), (facts["evidence"], facts["evidence"])
    yield ("device", "profile"), (facts["profile"], facts["profile"])
    for name, version in facts["versions"].items():
        if version is not None:
            yield ("version", name), (version, version)
    for name, row in facts["settings"].items():
        yield ("setting", name), (row["value"], f"{json.dumps(row['value'])} ({row['source']})")
    for facts in models:
        model = facts.get("model")
        if model is not None:
            yield ("model", model), (True, "served")
        for row in facts["operators"]:
            name = row["op"] if facts is models[0] else f"{row['op']} of {model}"
            # The reason for staying with SGLang is shown, but is not a difference.
            runs_on = {"sglang" if to.startswith("sglang") else to for to in row.get("runs_on", [row["picked"]])}
            yield ("operator", name), (runs_on, row["picked"])
        where = f"replaces ATen operators ({facts['aten_scope']})"
        for name in facts["aten_functions"]:
            yield ("FlagGems function", name), (where, where)
        for name, reason in facts["left_out"].items():
            yield ("left out", name), (True, reason)  # the reason has a date
