# SPDX-License-Identifier: Apache-2.0
"""With TEST_GPU_RECORD=FILE each test that ran is a line of JSON there: what, how it ended, what it printed, why it failed, where."""

import datetime
import functools
import json
import os
from pathlib import Path

import pytest
import torch
from result_file import source_hash

#: Whether this is a process of pytest-xdist that runs tests for another.
_is_worker = False


@functools.cache
def where() -> dict[str, object]:
    """The same in each line of a run; the source is that of sglang_fl and the benchmarks."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"devices": devices, "torch": torch.__version__, "source": source_hash()}


def pytest_configure(config: pytest.Config) -> None:
    global _is_worker
    _is_worker = hasattr(config, "workerinput")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _is_worker:
        return  # the process that has started the workers gets the same report
    if report.failed:
        print(f"\n{report.nodeid} failed:\n{report.longreprtext[-2000:]}", flush=True)  # a run that is ended prints no summary
    file = os.environ.get("TEST_GPU_RECORD")
    if not file or report.skipped or (report.when != "call" and not report.failed):
        return
    line = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "printed": report.capstdout.splitlines(),
        **({"why": report.longreprtext[-2000:]} if report.failed else {}),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **where(),
    }
    with Path(file).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
