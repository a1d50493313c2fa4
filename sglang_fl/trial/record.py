# SPDX-License-Identifier: Apache-2.0
"""The record of crashes and hangs of earlier starts, shared by all ranks and servers of a host.

The record is a JSON file: environment (versions and chip) -> name -> :class:`Death`. It is written under a lock and replaced whole.
Each process that runs trials also has its own file, ``<file>.<process>``, locked while the process lives. It holds the name of the
current trial, followed by how the process ended: faulthandler's output, a signal's number as a byte, or a line from the guard. The
next process that finds such a file unlocked evaluates and removes it.

A damaged record stops nothing: each entry is checked by itself, and the good ones stay in force.
"""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import SettingsError
from ..utils.folders import NoHomeDirectory, user_folder
from ..utils.packages import installed_version

logger = logging.getLogger("sglang_fl.trial")

#: A function's behaviour depends on these packages and the chip.
_PACKAGES = ("torch", "triton", "flag_gems", "sglang")
#: Signals from outside, which say nothing about the running function.
FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_OUTSIDE_BYTES = re.compile(b"[%s]" % bytes(FROM_OUTSIDE))
#: Output of faulthandler, and of the guard. A traceback alone is of a signal from outside.
_TRACEBACK = "(most recent call first)"
_FATAL, _TIMEOUT, SAID = re.compile(r"Fatal Python error: (.+)"), re.compile(r"Timeout \((.+)\)!"), "ended: "
#: The fields of an entry in the file. The first two must be there.
_FIELDS = {"reason": str, "date": str, "count": int, "decisive": bool}
#: So many damaged entries are named in a warning.
_NAMED = 5
#: SIGKILL may come from anywhere. Twice at the same name is not chance.
_DEATHS_WITHOUT_REASON = 2


@dataclass(frozen=True)
class Death:
    """How a process ended in a first run.

    Attributes:
        reason: what is known about it.
        date: the date of the last one.
        count: how many there were.
        decisive: whether one is enough to exclude the name.
    """

    reason: str
    date: str
    count: int = 1
    decisive: bool = True

    @property
    def excludes(self) -> bool:
        return self.decisive or self.count >= _DEATHS_WITHOUT_REASON

    def __str__(self) -> str:
        times = "" if self.count == 1 else f" {self.count} times"
        return f"{self.reason}{times}, last on {self.date}"


def environment(chip: str) -> str:
    """The versions and the chip that a record applies to, as text."""
    versions = [f"{name} {installed_version(name) or 'none'}" for name in _PACKAGES]
    return ", ".join([f"sglang-fl {__version__}", *versions, chip])


def default_path() -> Path:
    """The file in the user's state folder.

    Raises:
        SettingsError: the user has no home directory.
    """
    try:
        return user_folder("state", "the record of trials", "SGLANG_FL_TRIAL_RECORD") / "trials.json"
    except NoHomeDirectory as error:
        raise SettingsError(str(error)) from None


class TrialRecord:
    """The record of one environment.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, environment: str):
        self.path = path
        self.environment = environment
        path.parent.mkdir(parents=True, exist_ok=True)
        self._process_path = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
        self._owner = os.getpid()
        with self._locked():
            self._judge_ended_processes()
            self.file = os.open(self._process_path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND, 0o600)
            fcntl.lockf(self.file, fcntl.LOCK_EX)
        header = json.dumps({"environment": environment, "start": os.getppid()}) + "\n"
        self._header = len(header.encode())
        os.write(self.file, header.encode())
        os.set_blocking(self.file, False)  # required of a wakeup descriptor

    def excluded(self) -> dict[str, str]:
        """Name -> why a start in this environment leaves it out."""
        return excluded_by(self.path, self.environment)

    def note(self, name: str) -> None:
        """Write the name of the current trial. Empty: none."""
        os.ftruncate(self.file, self._header)
        if name:
            os.write(self.file, f"{name}\n".encode())

    def say(self, reason: str) -> None:
        """Write how the process ends."""
        os.write(self.file, f"{SAID}{reason}\n".encode())

    def was_signalled(self) -> bool:
        """Whether a signal from outside came in the current trial."""
        return _OUTSIDE_BYTES.search(os.pread(self.file, os.fstat(self.file).st_size, self._header)) is not None

    def exclude(self, name: str, reason: str) -> None:
        """Exclude a name from the next start, although the process did not end."""
        with self._locked():
            self._add([(self.environment, name, reason, True)])

    def close(self) -> None:
        """Remove the process's file."""
        if self._owner == os.getpid():
            with contextlib.suppress(OSError):
                self._process_path.unlink()
                os.close(self.file)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self.path.with_name(f"{self.path.name}.lock").open("ab") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            yield

    def _judge_ended_processes(self) -> None:
        """Add the results of ended processes to the record, and remove their files."""
        found: list[tuple[Any, str, str, str, bool]] = []
        name_of_one = re.compile(re.escape(self.path.name) + r"\.[0-9]+-[0-9a-f]{8}")
        for path in sorted(path for path in self.path.parent.iterdir() if name_of_one.fullmatch(path.name)):
            with contextlib.suppress(OSError), path.open("r+b") as file:  # OSError: its process lives, or another process removed it
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                text = file.read()
                path.unlink()
                if (death := _judge(text)) is not None:
                    found.append(death)
        explained = {start for start, *_, decisive in found if decisive}
        # SGLang kills the other ranks when one has ended. Ranks that ended at the same name count once: a container may be torn down.
        counted = {death[:3]: death[1:] for death in found if death[-1] or death[0] not in explained}
        self._add(list(counted.values()))

    def _add(self, deaths: list[tuple[str, str, str, bool]]) -> None:
        if not deaths:
            return
        record = _read(self.path)
        today = datetime.date.today().isoformat()
        for bound_to, name, reason, decisive in deaths:
            names = record.setdefault(bound_to, {})
            before = names.get(name)
            names[name] = Death(reason, today, before.count + 1 if before else 1, decisive or (before is not None and before.decisive))
        fresh = self.path.with_name(f"{self.path.name}.new")
        text = {bound_to: {name: asdict(death) for name, death in names.items()} for bound_to, names in record.items()}
        fresh.write_text(json.dumps(text, indent=1), encoding="utf-8")
        os.replace(fresh, self.path)


def read_record(path: Path) -> dict[str, dict[str, Death]]:
    """Read a record: what is not damaged. Empty if it is missing or cannot be read."""
    try:
        return _read(path)
    except OSError as error:
        logger.warning("sglang-fl: the record of trials %s cannot be read: %s", path, error.strerror or error)
        return {}


def excluded_by(path: Path, environment: str) -> dict[str, str]:
    """Name -> why a start in an environment leaves it out."""
    return {name: str(death) for name, death in read_record(path).get(environment, {}).items() if death.excludes}


def settled_record(path: Path) -> dict[str, dict[str, Death]]:
    """Read a record, after adding the processes that have ended since, if it is writable."""
    _settle(path)
    return read_record(path)


def forget(path: Path) -> bool:
    """Remove a record, damaged or not. Returns whether there was one. Files of running processes stay.

    Raises:
        OSError: it cannot be removed.
    """
    _settle(path)
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _settle(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.parent.is_dir():
            TrialRecord(path, "").close()


def _read(path: Path) -> dict[str, dict[str, Death]]:
    """The entries that are not damaged; a warning names the others.

    Raises:
        OSError: the file is there, and cannot be read.
    """
    damage: list[str] = []
    record: dict[str, dict[str, Death]] = {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError) as error:
        data = {}
        damage.append(f"it is no JSON: {error}")
    if not isinstance(data, dict):
        damage.append("it is no table of environments")
        data = {}
    for bound_to, names in data.items():
        if not isinstance(names, dict):
            damage.append(f"ignored: all of {bound_to!r}")
            continue
        deaths = {name: _death(entry) for name, entry in names.items()}
        record[bound_to] = {name: death for name, death in deaths.items() if death is not None}
        damage += [f"ignored: {name!r} of {bound_to!r}" for name, death in deaths.items() if death is None]
    if damage:
        more = [f"{len(damage) - _NAMED} more"] if len(damage) > _NAMED else []
        logger.warning(
            "sglang-fl: the record of trials %s is damaged (%s). 'sglang-fl doctor --forget' removes it",
            path,
            "; ".join(damage[:_NAMED] + more),
        )
    return record


def _death(entry: Any) -> Death | None:
    """An entry of the file. None: it is damaged. Fields of another version are ignored."""
    if not isinstance(entry, dict) or not {"reason", "date"} <= entry.keys():
        return None
    values = {name: entry[name] for name in _FIELDS if name in entry}
    if any(type(value) is not _FIELDS[name] for name, value in values.items()) or values.get("count", 1) < 1:
        return None
    return Death(**values)


def _judge(text: bytes) -> tuple[Any, str, str, str, bool] | None:
    """(start, environment, name, reason, decisive) from a process's file. None: no trial is to blame for its end."""
    header, _, rest = text.partition(b"\n")
    name, _, end = rest.partition(b"\n")
    try:
        about = json.loads(header)
        start, bound_to = about["start"], about["environment"]
    except (ValueError, TypeError, KeyError):  # it ended while writing its first line
        return None
    if not name or _OUTSIDE_BYTES.search(end):
        return None
    said = end.decode("utf-8", "replace")
    reason, decisive = "its process was killed", False
    if SAID in said:
        reason, decisive = said.partition(SAID)[2].splitlines()[0], True
    elif fatal := _FATAL.search(said):
        frame = re.search(r"Current thread .+\n\s*(.+)", said)
        reason, decisive = f"its process ended with {fatal[1]!r}{f' at {frame[1]}' if frame else ''}", True
    elif timeout := _TIMEOUT.search(said):
        reason, decisive = f"it did not end within {timeout[1]}", True
    elif _TRACEBACK in said:
        return None
    return start, bound_to, name.decode("utf-8", "replace"), reason, decisive
