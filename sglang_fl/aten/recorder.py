# SPDX-License-Identifier: Apache-2.0
"""The log of replaced operators, as they run."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import Settings

logger = logging.getLogger("sglang_fl.aten")

Function = Callable[..., Any]


class Recorder:
    """The log of replaced operators, as they run; of Layer 1 only, not of other calls of FlagGems.

    A line has the form of FlagGems's own log: ``[DEBUG] flag_gems.ops.mul.mul: aten::mul.Tensor``. Processes
    share the file; without one the lines go to the server's log.
    """

    def __init__(self, settings: Settings):
        self._path = Path(settings.flaggems_log_path).expanduser() if settings.flaggems_log_path else None
        self._once = settings.flaggems_log_once
        self._seen: set[str] = set()
        if self._path is None and not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)  # what was asked for is not less than SGLANG_FL_LOG_LEVEL

    def recording(self, key: str, fn: Function) -> Function:
        """``fn``, logging its calls."""
        line = f"{fn.__module__}.{fn.__name__}: aten::{key}"

        @functools.wraps(fn)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if key not in self._seen:
                if self._once:
                    self._seen.add(key)
                self._write(line)
            return fn(*args, **kwargs)

        return recorded

    def _write(self, line: str) -> None:
        if self._path is None:
            logger.info(line)
            return
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(f"[DEBUG] {line}\n".encode())
        except OSError as error:
            logger.error("the log of replaced operators %s cannot be written: %s", self._path, error)
            self._path = None
