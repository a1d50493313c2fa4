# SPDX-License-Identifier: Apache-2.0
"""The last check of each implementation on this machine, from the results that ``sglang-fl check --out`` saved."""

import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from ..dispatch.types import OpImpl
from ..utils.folders import NoHomeDirectory, user_folder
from ..utils.packages import installed_version, package_of, source_files
from .record import reports_in
from .results import Report, Row

#: The text for an implementation without a result.
NEVER = "never checked"
Certificates = Mapping[tuple[str, str], str]


def directory() -> Path:
    """The folder where ``check`` writes, and ``doctor`` and ``ops`` read.

    Raises:
        NoHomeDirectory
    """
    return user_folder("data", "the results of checks", "--out") / "checks"


def certificates(vendor: str, implementations: Iterable[OpImpl]) -> Certificates:
    """The newest result of each implementation on this vendor's chips, as text, by operator and implementation."""
    known = {(impl.op_name, impl.impl_id): impl for impl in implementations}
    found: dict[tuple[str, str], str] = {}
    try:
        saved = directory()
    except NoHomeDirectory:
        return found
    for _, report in reports_in(saved) if saved.is_dir() else ():
        if report.machine["vendor"].split()[0] != vendor or report.only:
            continue
        for row in report.rows():
            if row.done and (impl := known.get((row.op, row.impl))):
                found[row.op, row.impl] = _in_words(report, row, impl)
    return found


def _in_words(report: Report, row: Row, impl: OpImpl) -> str:
    scope = " with --quick" if report.quick else ""
    when = f"on {report.date[:10]}{scope}, on {report.machine['device']}"
    if row.failed or row.refused == row.done:
        words = f"FAILED {when}: {row.result}"
    else:
        words = f"PASSED {when}" if row.done == row.cases else f"INCOMPLETE {when}: {row.done} of {row.cases} cases"
    others = [f"{name} {then}, now {now}" for name, then in report.versions.items() if (now := installed_version(name)) and now != then]
    changed = _last_change(impl)
    if changed > datetime.fromisoformat(report.date).timestamp():
        others.append(f"older than its kernel's source, of {time.strftime('%Y-%m-%d %H:%M', time.localtime(changed))}")
    return "; ".join([words, *others])


def _last_change(impl: OpImpl) -> float:
    """The newest modification time in an implementation's package, or in its folder if it is sglang-fl's own."""
    return max((file.stat().st_mtime for file in source_files(package_of(impl.module))), default=0.0)
