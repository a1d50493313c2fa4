# SPDX-License-Identifier: Apache-2.0
"""Types of command line arguments."""

import argparse
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
