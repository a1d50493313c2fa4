# SPDX-License-Identifier: Apache-2.0
"""Start SGLang's server, also where packages that it imports are missing. Takes the arguments of sglang.launch_server."""

import argparse
import os
import sys

from ..platform.absent_packages import SERVE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.prefix_chars = "\0"  # All arguments are SGLang's, --help among them.
    parser.add_argument("arguments", nargs="*", help="as for python -m sglang.launch_server")


def run(args: argparse.Namespace) -> int:
    """Replace this process with the server."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", SERVE, *args.arguments])
