# SPDX-License-Identifier: Apache-2.0
"""SettingsError, and the hint with the nearest valid word."""

from collections.abc import Iterable

from ..utils.suggest import suggest

__all__ = ["SettingsError", "suggest"]


class SettingsError(ValueError):
    """One or more settings cannot be used. ``problems`` holds one sentence for each."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"sglang-fl: {self.problems[0]}"
        return "\n".join([f"sglang-fl: {len(self.problems)} settings cannot be used:", *(f"  - {p}" for p in self.problems)])
