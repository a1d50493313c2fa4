# SPDX-License-Identifier: Apache-2.0
"""Types of command line arguments."""

import argparse
import re
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def number(kind: Callable[[str], Number], accepts: Callable[[Number], bool], expected: str) -> Callable[[str], Number]:
    """A ``type`` for argparse: numbers for which ``accepts`` is true; ``expected`` says in words which."""

    def parse(text: str) -> Number:
        try:
            found = kind(text)
        except ValueError:
            found = None
        if found is None or not accepts(found):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return found

    return parse


def duration(text: str) -> float:
    """A ``type`` for argparse: seconds of ``90``, ``90s``, ``9m`` or ``1.5h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 9m or 1.5h, found {text!r}")
    return seconds
