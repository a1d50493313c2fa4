# SPDX-License-Identifier: Apache-2.0
"""Runs the user's command for a search. Each run is written to a file when it ends."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from ..config import SettingsError
from ..fingerprint import setting_facts, versions
from ..trial import record_path
from ..utils.json_lines import JsonLines
from ..utils.processes import end_in_order, family_of, marked, running
from ..utils.signals import exit_reason
from .search import Search
from .switches import Switches, prior_weights

#: The same exit code as for `git bisect run`.
_CANNOT_BE_JUDGED = 125
_NOT_RUN = {126: "the shell could not execute a command", 127: "the shell did not find a command"}
#: Seconds between SIGTERM and SIGKILL.
_GRACE = 10.0
#: The variable by which a run's processes are known. Its value is unique.
_MARK = "_SGLANG_FL_BISECT_RUN"
#: The search ends after this many runs in a row that could not be judged.
_UNJUDGED_IN_A_ROW = 5
#: The default time limit of a run, in seconds.
_LIMIT = 3600.0
_FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        on: the switches that were on.
        failed: whether it failed. None: it could not be judged.
        how: how it ended.
        output: the file with its output, next to the record.
        bound: whether a model was loaded with these settings. None: unknown, because the user set the dispatch log.
    """

    run: int
    on: list[str]
    failed: bool | None
    how: str
    seconds: float
    output: str
    bound: bool | None


class CommandFailed(Exception):
    """The search cannot continue. The message says why, and what to do."""


class CommandSearch:
    """A search that runs a command with different switches on.

    Args:
        path: the record. Its first line describes the search. Each start and each end of a run adds a line. A file with
            runs is continued.
        command: a shell command. None: the one in the record.
        limit: the time limit of a run in seconds. None: the one in the record.
        pairs: also look for two switches that act together.
        suspicion: for a new record, see :func:`prior_weights`.

    Raises:
        SettingsError: the record cannot be used, or belongs to another search.
    """

    def __init__(
        self,
        path: Path,
        switches: Switches,
        command: str | None = None,
        limit: float | None = None,
        *,
        pairs: bool = False,
        suspicion: Mapping[str, float] | None = None,
    ):
        self.path, self.switches = path, switches
        self.runs: list[Run] = []
        self._file = open_record(path)
        try:
            self._begin(command, limit, pairs, suspicion)
        except (TypeError, KeyError, AttributeError):  # from a line in another format
            self.close()
            raise SettingsError(_no_record(path)) from None
        except BaseException:
            self.close()
            raise

    def _begin(self, command: str | None, limit: float | None, pairs: bool, suspicion: Mapping[str, float] | None) -> None:
        """Write the first line of a new record, or read the runs of an old one."""
        switches = self.switches
        known = {"versions": versions(), "settings": _values(setting_facts(switches.settings)), "switches": list(switches.names)}
        if not self._file.found:
            if command is None:
                raise SettingsError(f"--resume: {self.path} is empty; start a search with --run 'CMD'")
            weights = prior_weights(switches.names, suspicion)
            header = {"format": _FORMAT, "command": command, "limit": limit or _LIMIT, "pairs": pairs, "weights": weights, **known}
            self._file.found.append(header)
            self._file.append(header)
            if self._file.problem:
                raise SettingsError(f"{self.path} cannot be written: {self._file.problem}")
        then, *lines = self._file.found
        for name in known:
            if then[name] != known[name]:
                raise SettingsError(f"--resume: {self.path} belongs to another search: {name} changed ({_change(then[name], known[name])})")
        if command not in (None, then["command"]):
            raise SettingsError(f"--resume: {self.path} was started with --run {then['command']!r}; leave out --run, or start a new search")
        self.command, self.limit = str(then["command"]), float(limit or then["limit"])
        self.search = Search(then["weights"], pairs=pairs or then["pairs"])
        begun: dict[str, Any] = {}
        for line in lines:
            begun = line if "process_group" in line else {}
            if not begun:
                self._take(Run(**line))
        # The search may have been killed, and its command not.
        if begun and (left := _left(begun["process_group"], begun["mark"])):
            processes = " ".join(str(process.pid) for process in left)
            raise SettingsError(
                f"--resume: the command of run {len(self.runs) + 1} seems to be still running; end it with: kill {processes}"
            )

    def _take(self, run: Run) -> None:
        self.runs.append(run)
        self.search.record(set(run.on), run.failed)

    def _append(self, data: dict[str, Any]) -> None:
        self._file.append(data)
        if self._file.problem:
            raise CommandFailed(f"{self.path} cannot be written: {self._file.problem}")

    def step(self, on: frozenset[str]) -> Run:
        """Run the command with these switches on, and record the result.

        Raises:
            CommandFailed: the command did not run, or cannot be judged.
        """
        number = len(self.runs) + 1
        output = self.path.with_name(f"{self.path.stem}-{number:03}.txt")
        # Absolute paths: the command may change its working directory.
        log, trials = (output.absolute().with_suffix(suffix) for suffix in (".dispatch", ".trials.json"))
        log.unlink(missing_ok=True)
        environ = self._environ(on, log, trials)
        began = time.monotonic()
        with output.open("wb") as file, _Process(self.command, environ, file) as process:
            self._append({"run": number, "process_group": process.group, "mark": process.mark})
            code = process.wait(self.limit)
        if code in _NOT_RUN:
            raise CommandFailed(f"exit code {code}: {_NOT_RUN[code]}; its output is in {output}")
        bound = log.exists() if environ.get("SGLANG_FL_DISPATCH_LOG") == str(log) else None
        failed = None if code == _CANNOT_BE_JUDGED else code != 0
        how = f"not finished within {self.limit:g} s" if code is None else _how_it_ended(code)
        run = Run(number, sorted(on), failed, how, round(time.monotonic() - began, 1), output.name, bound)
        self._append(asdict(run))
        self._take(run)
        last = self.runs[-_UNJUDGED_IN_A_ROW:]
        if len(last) == _UNJUDGED_IN_A_ROW and all(one.failed is None for one in last):
            raise CommandFailed(f"the last {_UNJUDGED_IN_A_ROW} runs could not be judged (exit code {_CANNOT_BE_JUDGED}); see {output}")
        return run

    def _environ(self, on: frozenset[str], log: Path, trials: Path) -> dict[str, str]:
        """The command's environment."""
        environ = {**os.environ, _MARK: uuid4().hex, "SGLANG_FL_DISPATCH_LOG": os.environ.get("SGLANG_FL_DISPATCH_LOG") or str(log)}
        for name, value in self.switches.environ(on).items():
            environ.pop(name, None)
            if value is not None:
                environ[name] = value
        # Each run starts with a copy of the user's trial record. Otherwise a run would leave out what crashed an earlier one.
        trials.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(record_path(self.switches.settings), trials)
        environ["SGLANG_FL_TRIAL_RECORD"] = str(trials)
        return environ

    @property
    def resume(self) -> str:
        """The command that continues it."""
        return f"sglang-fl bisect --resume {shlex.quote(str(self.path))}"

    def close(self) -> None:
        self._file.close()


def open_record(path: Path) -> JsonLines:
    """Open the record of a search. Raises SettingsError."""
    try:
        record = JsonLines(path)
        if not record.found or (record.found[0]["format"] == _FORMAT and "command" in record.found[0]):
            return record
    except BlockingIOError:
        raise SettingsError(f"{path} is in use by another sglang-fl bisect") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        pass
    raise SettingsError(_no_record(path))


def _no_record(path: Path) -> str:
    return f"{path} is not a record of this version of sglang-fl bisect"


class _Process:
    """A command in a session of its own. Ctrl-C reaches only this program, which then ends every process of the command."""

    def __init__(self, command: str, environ: Mapping[str, str], output: Any):
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, start_new_session=True
        )
        self.group, self.mark = self._process.pid, environ[_MARK]

    def wait(self, limit: float) -> int | None:
        """Return the exit code, or None if it did not end in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=limit)
        return None

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        """End its remaining processes: a server left running would hold the device and the port that the next run needs."""
        end_in_order(lambda: _left(self.group, self.mark), _GRACE)
        self._process.poll()


def _left(group: int, mark: str) -> list[psutil.Process]:
    """The running processes of a run: those of its group, and those with its mark in their environment."""
    return running(list({*family_of(group, os.getpgid), *marked(_MARK, mark)}))


def _how_it_ended(code: int) -> str:
    """An exit code in words. A shell reports a signal as 128 plus its number."""
    if 128 < code <= 128 + max(signal.valid_signals()):
        return f"exit code {code}, as after {exit_reason(128 - code)}"
    return exit_reason(code)


def _values(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: fact["value"] for name, fact in facts.items()}


def _change(then: Any, now: Any) -> str:
    if isinstance(then, list):
        then, now = dict.fromkeys(then, "on"), dict.fromkeys(now, "on")
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(f"{name}: {then.get(name)} before, {now.get(name)} now" for name in names[:3])
