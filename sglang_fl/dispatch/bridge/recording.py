# SPDX-License-Identifier: Apache-2.0
"""Records which implementation served a call."""

import threading
from typing import Any

from ..logger_manager import dispatch_log
from .base import Forward

#: After this many calls that fell back to SGLang, no more calls are recorded.
MAX_RECORDED_FALLBACKS = 8


class _Counts(threading.local):
    returned = 0
    raised = 0


class RecordingFunction:
    """An implementation's function that knows whether the calls meant for it reach it. Each thread has counts of its own."""

    def __init__(self, fn: Forward):
        self._fn = fn
        self._counts = _Counts()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = self._fn(*args, **kwargs)
        except BaseException:
            self._counts.raised += 1
            raise
        self._counts.returned += 1
        return result

    def record(self, name: str, destination: str, forward: Forward, /, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """Call a forward that ends in this function or in SGLang's own, and record which; after a failure the fallback is recorded.

        Returns:
            (the forward's result, whether the call went to SGLang without an attempt).
        """
        counts = self._counts
        returned, raised = counts.returned, counts.raised
        result = forward(*args, **kwargs)
        fell_back = (counts.returned, counts.raised) == (returned, raised)
        if fell_back:
            destination = f"sglang(arguments not supported by {destination})"
        if fell_back or counts.returned > returned:
            dispatch_log().record(name, destination)
        return result, fell_back


def call_and_record(name: str, destination: str, fn: Forward, /, *args: Any, **kwargs: Any) -> Any:
    """Call a function, and record that it served."""
    result = fn(*args, **kwargs)
    dispatch_log().record(name, destination)
    return result
