# SPDX-License-Identifier: Apache-2.0
"""Guards a first run: writes its name to the record before the run, and ends the process if the run exceeds its limit.

During the run faulthandler writes fatal signals to the record, and those from outside that would end the process. It does so, and ends
the process at the limit, without needing Python's lock. Python's own C handler records signals that have a handler. SGLang has its
workers killed when their parent dies; during a first run they get SIGTERM instead of SIGKILL, so that this differs from a kill.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..config import Settings, SettingsError
from ..config.options import InvalidValue, file_at
from .record import FROM_OUTSIDE, TrialRecord, default_path, environment, excluded_by

logger = logging.getLogger("sglang_fl.trial")

TO_TRY_AGAIN = "To try it again, run 'sglang-fl doctor --forget'"
#: Seconds after the limit until faulthandler ends the process: code that hangs may hold Python's lock.
_GRACE = 5.0
_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2
_NOT_RECORDED = "New crashes cannot be recorded: a start after a crash cannot exclude its cause"


class Guard:
    """The guard of a process that runs trials.

    Args:
        record: receives the names. None: they are not written.
        limit: the time limit of a first run in seconds. 0: no limit.
        remedy: a name -> the setting that leaves it out.
        excluded: name -> why it is left out, from this host's record.
    """

    def __init__(
        self,
        record: TrialRecord | None = None,
        limit: float = 0,
        remedy: Callable[[str], str] = str,
        excluded: Mapping[str, str] = MappingProxyType({}),
    ):
        self._record = record
        self._limit = limit
        self._remedy = remedy
        self._names: list[str] = []
        self._timer: threading.Timer | None = None
        self.excluded = excluded

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Guard a first run. First runs may be nested: the innermost is blamed, and the limit is its own.

        When it has ended, the one around it has the whole limit again.

        Raises:
            RuntimeError: it called ``sys.exit``. Only a handler of a signal may end a server.
        """
        if (self._record is None and not self._limit) or threading.current_thread() is not threading.main_thread():
            yield
            return
        with self._watched() if not self._names else contextlib.nullcontext():
            self._names.append(name)
            if self._record is None:
                logger.warning("first run of %s; if the process ends here, %s excludes it", name, self._remedy(name))
            try:
                self._begin_limit()
                yield
            except SystemExit as error:
                if self._record is None or self._record.was_signalled():
                    raise
                raise RuntimeError(f"it called sys.exit({'' if error.code is None else repr(error.code)})") from error
            finally:
                self._names.pop()
                self._begin_limit()

    def ends_the_process(self, name: str, reason: str) -> None:
        """Record a name that leaves the process unusable."""
        logger.critical("sglang-fl: %s: %s. The next start excludes it%s", name, reason, self._where(name))
        self.exclude(name, reason)

    def exclude(self, name: str, reason: str) -> None:
        """Exclude a name from the next start."""
        try:
            if self._record is not None:
                self._record.exclude(name, reason)
        except OSError as error:
            logger.warning("sglang-fl: the record of trials cannot be written (%s); %s excludes %s", error, self._remedy(name), name)

    def _note(self) -> None:
        try:
            if self._record is not None:
                self._record.note(self._names[-1] if self._names else "")
        except OSError as error:
            logger.warning("sglang-fl: the record of trials %s cannot be written any more: %s", self._record and self._record.path, error)
            self._record = None

    def _begin_limit(self) -> None:
        """Write down the innermost run and begin its limit, in place of that of another. None runs: there is no limit."""
        self._note()
        if not self._limit:
            return
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._names:
            self._timer = threading.Timer(self._limit, self._end, [self._names[-1]])
            self._timer.daemon = True
            file = self._record.file if self._record is not None else 2
            with _signals_kept():
                self._timer.start()
                faulthandler.dump_traceback_later(self._limit + _GRACE, exit=True, file=file)

    def _end(self, name: str) -> None:
        reason = f"its first run did not end within {self._limit:g} s"
        if self._record is not None:
            self._record.say(reason)
        logger.critical("sglang-fl: %s: %s, so this process ends%s", name, reason, self._where(name))
        sys.stderr.flush()
        os._exit(1)

    def _where(self, name: str) -> str:
        if self._record is None:
            return f"; {self._remedy(name)} excludes it"
        return f". The next start excludes it ({self._record.path})"

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Record in the process's file how the process ends, if it does."""
        if self._record is None:
            yield
            return
        file, was_enabled = self._record.file, faulthandler.is_enabled()
        before = signal.set_wakeup_fd(file, warn_on_full_buffer=False)
        ends = [signum for signum in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(signum) == signal.SIG_DFL]
        for signum in ends:
            faulthandler.register(signum, file=file, all_threads=False, chain=True)
        faulthandler.enable(file=file)
        try:
            with _parents_death_as(signal.SIGTERM):
                yield
        finally:
            for signum in ends:
                faulthandler.unregister(signum)
            signal.set_wakeup_fd(before)
            if was_enabled:
                faulthandler.enable(file=2)
            else:
                faulthandler.disable()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Threads that start meanwhile leave signals from outside to this one. In a thread that has just begun faulthandler writes nothing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_OUTSIDE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _parents_death_as(signum: int) -> Iterator[None]:
    """If this process would be killed when its parent dies, request this signal instead."""
    asked = ctypes.c_int(0)
    prctl: Any = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None
    if prctl is not None:
        prctl(_PR_GET_PDEATHSIG, ctypes.byref(asked), 0, 0, 0)
    if asked.value != signal.SIGKILL:
        yield
        return
    prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_PDEATHSIG, asked.value, 0, 0, 0)


_guard = Guard()


def current_guard() -> Guard:
    """The process's guard. Before :func:`open_guard` it guards nothing."""
    return _guard


def record_path(settings: Settings) -> Path:
    """The file of the record.

    Raises:
        SettingsError: no file can be there.
    """
    try:
        return file_at(settings.trial_record) if settings.trial_record else default_path()
    except InvalidValue as error:
        raise SettingsError(f"trial_record ({settings.source('trial_record')}): {error}") from None


def open_guard(settings: Settings, chip: str) -> Guard:
    """Create the guard of a process that runs a model, from its settings."""
    global _guard
    bound_to = environment(chip)
    before, record = _guard._record, None
    excluded: Mapping[str, str] = {}
    try:
        path = record_path(settings)
        if before is not None and (before.path, before.environment) == (path, bound_to):
            return _guard
        if before is not None:
            before.close()
        record = TrialRecord(path, bound_to)
        excluded = record.excluded()
        atexit.register(record.close)
    except SettingsError as error:  # the settings were checked; the folder may have changed since, or there is no home
        logger.warning("%s. %s", error, _NOT_RECORDED)
    except OSError as error:
        excluded = excluded_by(path, bound_to)
        logger.warning(
            "sglang-fl: the record of trials %s cannot be written (%s). What it excludes stays excluded. %s. "
            "Set SGLANG_FL_TRIAL_RECORD to a writable file",
            path,
            error.strerror or error,
            _NOT_RECORDED,
        )
    _guard = Guard(record, settings.trial_limit, settings.exclusion_of, excluded)
    return _guard
