# SPDX-License-Identifier: Apache-2.0
"""The command ``sglang-fl``. One file a verb; each has ``add_arguments(parser)`` and ``run(args) -> int``."""

import errno
import faulthandler
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from .. import __version__
from ..config import SettingsError
from ..utils.folders import NoHomeDirectory
from ..utils.signals import interrupt_on_termination
from . import bisect, check, config, demo, doctor, kernels, new_vendor, ops, serve, tune
from .arguments import Parser

VERBS = {
    "demo": demo,
    "serve": serve,
    "doctor": doctor,
    "ops": ops,
    "kernels": kernels,
    "config": config,
    "check": check,
    "bisect": bisect,
    "tune": tune,
    "new-vendor": new_vendor,
}

#: Errors of a write to standard output.
_CANNOT_WRITE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def make_parser() -> Parser:
    """The command line's parser; it puts the verb's name into ``verb``."""
    parser = Parser(prog="sglang-fl", description="SGLang on any AI chip with FlagOS.")
    parser.add_argument("--version", action="version", version=f"sglang-fl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        help_line = (verb.__doc__ or "").strip().splitlines()[0]
        verb.add_arguments(verbs.add_parser(name, help=help_line, description=help_line))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 success, 1 failure, 2 wrong usage or unusable settings."""
    args = make_parser().parse_args(argv)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A terminal may not be able to encode our output.
    if not faulthandler.is_enabled():
        faulthandler.enable()  # A crash while a package is imported is reported with file and line.
    try:
        with interrupt_on_termination():
            code: int = VERBS[args.verb].run(args)
        sys.stdout.flush()
        return code
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except NoHomeDirectory as error:
        print(f"sglang-fl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sglang-fl: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _CANNOT_WRITE or error.filename is not None:
            raise
        # The rest of the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader closed the pipe
            print(f"sglang-fl: cannot write the output: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
