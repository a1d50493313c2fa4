# SPDX-License-Identifier: Apache-2.0
"""What the command lines of several benchmarks take."""

import argparse


def positive(text: str) -> int:
    """A number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)
