# SPDX-License-Identifier: Apache-2.0
"""The names that settings may use, gathered from those who know them."""

import ast
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ..config import Settings, Words
from ..device import Device
from ..dispatch.backends.flaggems.library import why_not_here
from ..dispatch.builtin_ops import known_words
from ..dispatch.catalog import CLASSES, NOT_COVERED_CLASSES
from ..dispatch.kernel_implementations import is_kernel, names_of
from ..dispatch.manager import OpManager


def settings_words(manager: OpManager | None, plugin_modules: Sequence[str] = ()) -> Words:
    """The names of this package and, with a manager, of the backends that are installed, which it imports."""
    if manager is not None:
        manager.discover(plugin_modules)
    words = known_words(manager.registry if manager is not None else None)
    kernels = {name for op in words.operators or () if is_kernel(op) for name in names_of(op)}
    return replace(words, classes=CLASSES | kernels, flaggems=flaggems_functions(), not_covered=NOT_COVERED_CLASSES)


def flaggems_functions() -> frozenset[str] | None:
    """The names of the functions with which FlagGems replaces ATen operators; None: not installed."""
    rows = flaggems_table()
    return None if rows is None else frozenset(function for _, function in rows)


@lru_cache(maxsize=1)
def flaggems_table() -> tuple[tuple[str, str], ...] | None:
    """(ATen operator, FlagGems function that replaces it); None: not installed.

    Read from its source: importing FlagGems takes seconds and needs its device.
    """
    spec = importlib.util.find_spec("flag_gems")
    if spec is None or spec.origin is None:
        return None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "_FULL_CONFIG" for t in node.targets):
            rows = [row.elts for row in ast.walk(node.value) if isinstance(row, ast.Tuple) and len(row.elts) >= 2]
            return tuple(
                (str(key.value), function.id)
                for key, function, *_ in rows
                if isinstance(key, ast.Constant) and isinstance(function, ast.Name)
            )
    return None


def used_functions(settings: Settings, device: Device) -> list[str]:
    """The FlagGems functions that replace ATen operators under these settings, where they can."""
    if not settings.use_flaggems or why_not_here(device) is not None:
        return []
    return sorted(function for function in flaggems_functions() or () if settings.flagos_exclusion_reason(function) is None)
