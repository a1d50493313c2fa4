# SPDX-License-Identifier: Apache-2.0
"""SettingsError, and the sentence that tells a user which word was meant."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


class SettingsError(ValueError):
    """One or more settings cannot be used. ``problems`` holds one sentence for each."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"sglang-fl: {self.problems[0]}"
        return "\n".join([f"sglang-fl: {len(self.problems)} settings cannot be used:", *(f"  - {p}" for p in self.problems)])


def suggest(word: str, valid: Iterable[str] | Mapping[str, str]) -> str:
    """``"; did you mean 'x'?"`` with the nearest valid word, or the valid ones if none is near.

    A mapping leads from words to compare with to the words to show.
    """
    names = sorted(set(valid.values() if isinstance(valid, Mapping) else valid))
    lowered = {shape.lower(): name for shape, name in (valid.items() if isinstance(valid, Mapping) else zip(names, names, strict=True))}
    close = get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {lowered[close[0]]!r}?"
    if not names:
        return ""
    shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
    return f"; valid: {shown}"
