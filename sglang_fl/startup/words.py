# SPDX-License-Identifier: Apache-2.0
"""The names that settings may use, gathered from those who know them."""

import ast
import importlib.util
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ..config import Vocabulary
from ..dispatch.bridge.catalog import CLASSES, NOT_COVERED_CLASSES
from ..dispatch.manager import OpManager


def vocabulary(manager: OpManager) -> Vocabulary:
    """Names of this package, and of the backends that are found if one is not among them."""
    return replace(
        manager.vocabulary(()),  # with plugin modules they were found when those were checked
        classes=CLASSES,
        flaggems=flaggems_functions(),
        not_covered=NOT_COVERED_CLASSES,
        hints={"classes": "sglang-fl ops lists the classes"},
    )


@lru_cache(maxsize=1)
def flaggems_functions() -> frozenset[str] | None:
    """The names of the functions with which FlagGems replaces ATen operators; None: not installed.

    Read from its source: importing FlagGems takes seconds and needs its device.
    """
    spec = importlib.util.find_spec("flag_gems")
    if spec is None or spec.origin is None:
        return None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "_FULL_CONFIG" for t in node.targets):
            rows = [row for row in ast.walk(node.value) if isinstance(row, ast.Tuple) and len(row.elts) >= 2]
            return frozenset(row.elts[1].id for row in rows if isinstance(row.elts[1], ast.Name))
    return None
