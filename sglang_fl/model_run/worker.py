# SPDX-License-Identifier: Apache-2.0
"""A process that runs one rank of a model: ``python -m sglang_fl.model_run.worker FILE_DESCRIPTOR``; see ``processes.py``."""

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ..utils.child import connection_to_parent, receive, send


def main() -> None:
    faulthandler.enable()
    connection = connection_to_parent()
    job = receive(connection)
    run: Any = None

    def load() -> None:
        nonlocal run
        from .run import ModelRun

        run = ModelRun.load(**job)

    if _answer(connection, load, ()):
        while True:
            try:
                function, args = receive(connection)
            except EOFError:  # the parent has ended
                break
            except Exception as error:
                send(connection, ("raised", f"{type(error).__name__}: {error}", traceback.format_exc()))
                continue
            _answer(connection, function, (run, *args))
    sys.stdout.flush()
    os._exit(0)  # SGLang's threads would keep it alive


def _answer(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Call a function and send its result or error. Returns whether it returned."""
    try:
        send(connection, ("result", function(*args)))
        return True
    except SystemExit:  # raised by SGLang's argument parser, which printed its message
        sys.stderr.flush()
        send(connection, ("raised", "SGLang does not take its arguments", ""))
    except BaseException as error:
        send(connection, ("raised", f"{type(error).__name__}: {error}", traceback.format_exc()))
    return False


if __name__ == "__main__":
    main()
