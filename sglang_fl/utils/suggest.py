# SPDX-License-Identifier: Apache-2.0
"""Nearest-name hints for error messages."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


def suggest(word: str, valid: Iterable[str] | Mapping[str, str]) -> str:
    """``"; did you mean 'x'?"`` with the nearest valid word, or the valid ones if none is near.

    A mapping's keys are compared with, and its values shown.
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
