# SPDX-License-Identifier: Apache-2.0
"""The command ``sglang-fl``. One file a verb; each has ``add_arguments(parser)`` and ``run(args) -> int``."""

import argparse
import errno
import faulthandler
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from .. import __version__
from ..config import SettingsError
from . import check, config, demo, doctor, new_vendor, ops

VERBS = {"demo": demo, "doctor": doctor, "ops": ops, "config": config, "check": check, "new-vendor": new_vendor}

#: What a write to standard output fails with.
_CANNOT_WRITE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Exit codes: 0 well, 1 something is wrong, 2 wrong use or settings that cannot be used."""
    parser = argparse.ArgumentParser(prog="sglang-fl", description="SGLang on any AI chip with FlagOS.")
    parser.add_argument("--version", action="version", version=f"sglang-fl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        help_line = (verb.__doc__ or "").strip().splitlines()[0]
        verb.add_arguments(verbs.add_parser(name, help=help_line, description=help_line))
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A terminal without our characters must not cost a run.
    if not faulthandler.is_enabled():
        faulthandler.enable()  # A package that crashes while it is imported is named by its file and line.
    try:
        code = VERBS[args.verb].run(args)
        sys.stdout.flush()
        return code
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sglang-fl: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _CANNOT_WRITE or error.filename is not None:
            raise
        # What is left in the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whose reader is gone, and wants no more
            print(f"sglang-fl: the output cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
