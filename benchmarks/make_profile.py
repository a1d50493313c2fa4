#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes sglang_fl/config/nvidia.yaml from what was measured on NVIDIA GPUs.

    python benchmarks/make_profile.py            # writes the file
    python benchmarks/make_profile.py --check    # exits with 1 and a diff if the file would change

It is the sum of ``profile-*.yaml`` in benchmarks/results, each of ``sglang-fl tune MODEL``, as ``sglang-fl tune --merge`` writes it, and
``triton_faster``: the operators whose Triton kernel of this package goes before FlagGems's where FlagOS is preferred. That is right
at every shape, at least 2 % faster than FlagGems's in the median, from 64 tokens on nowhere above 1.10 of its time, and with fewer
nowhere more than 1 µs slower, in every sitting that measured both: ``triton-*.json``, of ``ops.py``, on any GPU of the platform.
"""

import argparse
import difflib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import result_file

from sglang_fl.config import SettingsError, suggest
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.tune.judge import MAX_MEDIAN
from sglang_fl.tune.merge import merge
from sglang_fl.tune.profile import as_text
from sglang_fl.utils.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PROFILE = ROOT / "benchmarks" / "results", ROOT / "sglang_fl" / "config" / "nvidia.yaml"
#: What this package's Triton kernels may take of FlagGems's time from so many tokens on, and how many µs more with fewer.
MAX_OF_FLAGGEMS, FROM_TOKENS, MAX_MORE_US = 1.1, 64, 1.0
LEAST_SHAPES = 6
_HEAD = """\
# NVIDIA GPUs. Written by benchmarks/make_profile.py from benchmarks/results; do not edit, run it again:
#     python benchmarks/make_profile.py
# The rule is in docs/tune.md: something of FlagOS's is used if each model that calls it uses it. `measured` has figures and reasons.
"""

#: Times and ratios of times. (1e999 is read as infinity.)
Figure = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]


class Row(msgspec.Struct):
    """A row of ``ops.py``."""

    op: str
    kind: str
    hidden: int
    tokens: int
    variant: str | None = None
    us: Figure | None = None
    ratio: tuple[Figure, Figure, Figure] | None = None
    error: str | None = None

    @property
    def place(self) -> tuple[str | None, int, int]:
        """Its operator's form, and its shape."""
        return self.variant, self.hidden, self.tokens

    def __str__(self) -> str:
        return f"{self.tokens}x{self.hidden}{' ' + self.variant if self.variant else ''}"


def read_rows(path: Path) -> list[Row]:
    """Raises ValueError for what ``ops.py`` did not write."""
    try:
        rows = msgspec.convert(result_file.read(path)["rows"], list[Row])
    except msgspec.ValidationError as error:
        raise ValueError(f"{path.name}: {error}") from None
    for row in rows:
        if row.op not in OPERATORS:
            raise ValueError(f"{path.name}: there is no operator {row.op!r}{suggest(row.op, OPERATORS)}")
    return rows


def judge_triton(op: str, rows: Sequence[Row]) -> tuple[bool, str] | None:
    """Whether this package's Triton kernel goes before FlagGems's, and why. None where they were not both measured."""
    ours, theirs = ({row.place: row for row in rows if (row.op, row.kind) == (op, kind)} for kind in ("triton", "flagos"))
    if not ours or not theirs:
        return None
    failed = next((row for row in ours.values() if not row.ratio), None)
    if failed is not None:
        return False, f"failed at {failed}: {failed.error}"
    if len(ours) < max(len(theirs), LEAST_SHAPES):
        return False, f"timed at {len(ours)} of {max(len(theirs), LEAST_SHAPES)} shapes only"
    own = {place: row.ratio[0] for place, row in ours.items() if row.ratio}
    ratios = {place: own[place] / row.ratio[0] for place, row in theirs.items() if place in ours and row.ratio}
    if not ratios:
        return True, "FlagGems's failed at every shape"
    for place, ratio in sorted(ratios.items(), key=lambda item: -item[1]):
        row, more = ours[place], (ours[place].us or 0.0) - (theirs[place].us or 0.0)
        if ratio > MAX_OF_FLAGGEMS if row.tokens >= FROM_TOKENS else more > MAX_MORE_US:
            return False, f"{ratio:.2f} times FlagGems's time at {row} ({row.us:.2f} µs)"
    median = statistics.median(ratios.values())
    figures = f"{_range(list(ratios.values()), 3)} of FlagGems's time, {_range(list(own.values()), 2)} of SGLang's"
    return median <= MAX_MEDIAN, figures


def _range(ratios: Sequence[float], digits: int) -> str:
    """The median, and the ends."""
    return f"{statistics.median(ratios):.{digits}f} ({min(ratios):.2f} to {max(ratios):.2f})"


def profile(results: Path) -> str:
    """The profile's text. Raises ValueError or SettingsError if a file is not as it should be."""
    found = merge(sorted(results.glob("profile-*.yaml")))
    measured = found.pop("measured")
    sittings = {path.name: read_rows(path) for path in sorted(results.glob("triton-*.json"))}
    verdicts = {op: {name: one for name, rows in sittings.items() if (one := judge_triton(op, rows))} for op in sorted(OPERATORS)}
    faster = [op for op, of in verdicts.items() if of and all(accepted for accepted, _ in of.values())]
    reasons = {op: {name: reason for name, (_, reason) in of.items()} for op, of in verdicts.items() if of}
    return as_text(_HEAD, {**found, "triton_faster": faster, "measured": {**measured, "triton": reasons}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 and a diff if the profile would change")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIRECTORY")
    parser.add_argument("--profile", type=Path, default=PROFILE, metavar="FILE.yaml")
    args = parser.parse_args()
    try:
        text = profile(args.results)
    except (OSError, ValueError, SettingsError) as error:
        sys.exit(f"make_profile: {error}")
    if not args.check:
        write_whole(args.profile, text)
        print(f"{args.profile.name} was written")
        return
    there = args.profile.read_text(encoding="utf-8") if args.profile.exists() else ""
    if there != text:
        sys.stdout.writelines(difflib.unified_diff(there.splitlines(True), text.splitlines(True), args.profile.name, "from the results"))
        sys.exit(1)


if __name__ == "__main__":
    main()
