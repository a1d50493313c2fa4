# SPDX-License-Identifier: Apache-2.0
"""Tables in a terminal."""

from collections.abc import Collection
from typing import Any

from rich.table import Table


def table(title: str, *columns: str, right: Collection[str] = (), **options: Any) -> Table:
    """A table without rows, whose long texts are folded. ``right``: the columns of numbers."""
    found = Table(title=title or None, title_justify="left", **options)
    for column in columns:
        found.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return found
