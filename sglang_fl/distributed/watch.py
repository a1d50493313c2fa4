# SPDX-License-Identifier: Apache-2.0
"""Ends the process when a communicator fails outside of a call, for example because a peer is gone. Otherwise it would wait forever."""

import logging
import os
import sys
import threading
import time

from .communicator import CommunicatorFL

logger = logging.getLogger("sglang_fl")

#: The interval for asking the communicators, in seconds.
_INTERVAL = 2.0


class Watch:
    """Asks communicators for errors from a thread. SGLang ends the server when one of its processes ends."""

    def __init__(self) -> None:
        self._communicators: list[CommunicatorFL] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, communicator: CommunicatorFL) -> None:
        with self._lock:
            self._communicators.append(communicator)
            if self._thread is None:
                self._thread = threading.Thread(target=self._poll, name="flagcx-watch", daemon=True)
                self._thread.start()

    def remove(self, communicator: CommunicatorFL) -> None:
        """Stop watching a communicator. Call it before the communicator is freed."""
        with self._lock:
            if communicator in self._communicators:
                self._communicators.remove(communicator)

    def _poll(self) -> None:
        while True:
            time.sleep(_INTERVAL)
            with self._lock:
                errors = [error for communicator in self._communicators if (error := communicator.async_error()) is not None]
            if errors:
                logger.critical(errors[0])
                sys.stderr.flush()
                os._exit(1)
