# SPDX-License-Identifier: Apache-2.0
"""A file with a JSON object a line, written as they come, so that what ends early can go on."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """Such a file, locked as long as it is open.

    Attributes:
        found: what it held when it was opened; a last line that was cut off is none.
        error: what kept the file from being written, last.

    Raises:
        BlockingIOError: it is in use.
        OSError: it cannot be opened.
        ValueError: its lines are no JSON.
    """

    def __init__(self, path: Path):
        self.error: OSError | None = None
        self._unwritten = b""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = path.read_bytes()
            self._size = found.rfind(b"\n") + 1
            self.found: list[Any] = read_lines(found)
        except BaseException:
            os.close(self._file)
            raise

    def append(self, data: dict[str, Any]) -> None:
        """A line, or none of it; what a full disk did not take is tried again with the next."""
        self._unwritten += json.dumps(data).encode() + b"\n"
        try:
            os.ftruncate(self._file, self._size)
            written = os.pwrite(self._file, self._unwritten, self._size)
        except OSError as error:
            self.error = error
            return
        if written < len(self._unwritten):
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return
        self._size += written
        self._unwritten, self.error = b"", None

    @property
    def problem(self) -> str | None:
        """Why the file could not be written, last."""
        return None if self.error is None else str(self.error.strerror)

    def sync(self) -> None:
        """Have what was written survive a power cut."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def read_lines(text: bytes) -> list[Any]:
    """The objects of a file's whole lines. Raises ValueError."""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
