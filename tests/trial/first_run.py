# SPDX-License-Identifier: Apache-2.0
"""A process that makes one trial, of what its arguments say, and may end in it.

python first_run.py RECORD LIMIT NAME WHAT
"""

import ctypes
import logging
import os
import signal
import sys
import time

from sglang_fl.config import Settings
from sglang_fl.trial import open_guard


def hang_without_python() -> None:
    """As a kernel's compiler may: Python's lock is held, and a signal does not end the call, as it would end sleep()."""
    lock = ctypes.PyDLL(None).pthread_mutex_lock
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        lock(mutex)


def main() -> None:
    record, seconds, name, what = sys.argv[1:]
    limit = float(seconds)
    logging.basicConfig(level=logging.INFO)
    guard = open_guard(Settings(trial_record=record, trial_limit=limit), "a chip")
    with guard.running(name):
        print("running", flush=True)
        if what == "hangs":
            time.sleep(3600)
        elif what == "hangs without python":
            hang_without_python()
        elif what == "hangs in an inner run":
            with guard.running("inner"):
                time.sleep(3600)
        elif what == "has inner runs":
            for _ in range(4):
                with guard.running("inner"):
                    time.sleep(limit / 3)
        elif what == "hangs without python after an inner run":
            with guard.running("inner"):
                pass
            hang_without_python()
        elif what in ("parent", "parent without python"):
            os.kill(os.getppid(), signal.SIGKILL)
            if what == "parent without python":
                hang_without_python()
            time.sleep(3600)
        elif what == "raises":
            raise ArithmeticError("an error is no death")
        elif what == "exits when it gets SIGTERM":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3600)
        elif what == "waits":
            sys.stdin.read()
        else:
            os.kill(os.getpid(), getattr(signal, what))
            time.sleep(3600)


main()
