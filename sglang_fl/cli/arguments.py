# SPDX-License-Identifier: Apache-2.0
"""Types of command line arguments."""

import argparse
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from ..config import SettingsError

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """A parser, of verbs too.

    Attributes:
        takes_server_arguments: what stands behind a lone ``--`` is for the server; it becomes ``server_arguments``.
    """

    takes_server_arguments = False
    _options: tuple[str, ...] = ()

    def add_argument(self, *names: Any, **values: Any) -> argparse.Action:
        self._options += names
        return super().add_argument(*names, **values)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if not self.takes_server_arguments:
            return super().parse_known_args(words, namespace)
        split = words.index("--") if "--" in words else len(words)
        found, left = super().parse_known_args(words[:split], namespace)
        if left:
            near = [match for word in left for match in get_close_matches(word.partition("=")[0], self._options, 1, 0.8)]
            hint = f"did you mean {near[0]!r}? " if near else ""
            self.error(f"unrecognized arguments: {' '.join(left)} ({hint}arguments of sglang.launch_server go after --)")
        found.server_arguments = words[split + 1 :]
        return found, left


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


def make_directory(option: str, path: Path) -> Path:
    """Create the directory that an option names. Raises SettingsError."""
    try:
        path.expanduser().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{option}: {path} cannot be created: {error.strerror}") from None
    return path.expanduser()


def duration(text: str) -> float:
    """A ``type`` for argparse: seconds of ``90``, ``90s``, ``9m`` or ``1.5h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 9m or 1.5h, found {text!r}")
    return seconds
