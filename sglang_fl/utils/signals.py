# SPDX-License-Identifier: Apache-2.0
"""Signals that end a process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupt_on_termination() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP do what Ctrl-C does, so that ``with`` blocks clean up. For the main thread."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {name: signal.signal(name, interrupt) for name in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def exit_reason(code: int) -> str:
    """How a child process ended, from its return code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"
