# SPDX-License-Identifier: Apache-2.0
"""Signals that end a process."""

import signal


def interrupt_on_termination() -> None:
    """Make SIGTERM and SIGHUP do what Ctrl-C does, so that ``with`` blocks clean up."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), interrupt)
