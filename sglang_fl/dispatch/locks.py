# SPDX-License-Identifier: Apache-2.0
"""A lock that a forked child can use."""

import os
import threading
import weakref
from types import TracebackType


class ForkSafeLock:
    """A reentrant lock, free in a forked child.

    An ordinary lock that another thread held while the process forked stays locked in the child for
    ever: the thread that would free it is not there.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def renew(self) -> None:
        if not self._lock._is_owned():  # type: ignore[attr-defined]  # the thread that forked lives on in the child
            self._lock = threading.RLock()


_locks: "weakref.WeakSet[ForkSafeLock]" = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _locks:
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
