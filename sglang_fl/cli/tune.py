# SPDX-License-Identifier: Apache-2.0
"""Measure which implementations are right and faster for a model on this machine, and write a profile."""

import argparse
from pathlib import Path

from ..config import SettingsError
from .arguments import Parser, duration, number

_POSITIVE = number(int, lambda count: 0 < count < 1 << 20, "a number above 0")
#: The server's names for what MODEL is.
_MODEL_OPTIONS = ("--model-path", "--model")
_EXIT_CODES = """exit codes: 0 the profile was written; 1 the engine failed; 2 wrong usage;
3 the budget was used up: the profile has the decisions so far, --resume continues; 130 interrupted, --resume continues"""


def add_arguments(parser: Parser) -> None:
    parser.takes_server_arguments = True
    parser.usage = (
        "sglang-fl tune [options] MODEL [-- any arguments of sglang.launch_server]\n       sglang-fl tune --merge PROFILE … --out FILE"
    )
    parser.epilog = _EXIT_CODES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", nargs="?", help="as --model-path of sglang.launch_server")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the profile (default: that of --update, or profile.yaml)")
    parser.add_argument("--traffic", type=Path, metavar="FILE", help="your requests, one JSON object per line (default: a mix)")
    parser.add_argument(
        "--budget",
        type=duration,
        metavar="TIME",
        help="write the profile with the decisions so far after this time, such as 45m; --resume continues",
    )
    parser.add_argument("--resume", action="store_true", help="continue an earlier run with the same --out")
    parser.add_argument("--update", type=Path, metavar="PROFILE", help="measure only entries whose conditions have changed")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="PROFILE",
        help="measure nothing; write the profile of a chip from those of models that were tuned on it",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured and about how long it takes; measure nothing")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report as an HTML page")
    parser.add_argument("--batch", type=_POSITIVE, nargs="+", default=None, metavar="N", help="batch sizes (default: 1 32; on a CPU: 1 4)")
    parser.add_argument("--input-len", type=_POSITIVE, metavar="N", help="tokens of a prompt for prefill (default: 1024; on a CPU: 64)")
    parser.add_argument("--output-len", type=_POSITIVE, metavar="N", help="decode steps that are timed (default: 64; on a CPU: 16)")


def run(args: argparse.Namespace) -> int:
    _check_usage(args)
    from .tune_run import run as measure  # imports PyTorch

    return measure(args)


def _check_usage(args: argparse.Namespace) -> None:
    """Refuse what would be ignored. Raises SettingsError."""
    if args.merge:
        names = ("dry_run", "resume", "budget", "html", "update", "traffic", "batch", "input_len", "output_len")
        given = ["a MODEL"] if args.model is not None else []
        given += [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]
        given += ["arguments of the server"] if args.server_arguments else []
        if given:
            raise SettingsError(f"--merge measures nothing, so it takes only profiles and --out: leave out {', '.join(given)}")
    for word in args.server_arguments:
        if word.partition("=")[0] in _MODEL_OPTIONS:
            raise SettingsError(f"the model is given twice, as MODEL and after --: leave out {word.partition('=')[0]}")
