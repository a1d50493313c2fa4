# SPDX-License-Identifier: Apache-2.0
"""The process that implementations run in: ``python -m sglang_fl.check.worker FD JOB``, started by ``runner``.

It writes the machine, the versions and the cases as a JSON line to the file descriptor FD, then reads the numbers of cases
from its standard input and answers each with a JSON line. Before an answer come lines that say when it begins and ends to
compute in float64. It ends when its input does.
"""

import faulthandler
import json
import math
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..device import Device, detect, why_unusable
from ..dispatch.manager import get_default_manager
from ..dispatch.types import OpImpl
from .cases import OPERATORS_CHECKED, Case, cases_of
from .check_case import check_case
from .constants import IN_FLOAT64
from .exact.judge import DTYPES
from .implementation import Implementation, Outcome

_PACKAGES = ("torch", "triton", "sglang", "flag_gems", "torch_npu")
_REFERENCE = "reference.torch"


class Worker:
    """The implementations and their cases.

    Args:
        job: ``targets``, pairs of an operator and an implementation's id; ``quick``; ``seed``.
        send: sends a message to the runner.
    """

    def __init__(self, job: Mapping[str, Any], send: Callable[[Mapping[str, Any]], None]):
        self.found: Device = detect()
        unusable = why_unusable(torch, self.found.device_type)
        if unusable is not None:
            sys.exit(f"{self.found.vendor} ({self.found.evidence}): {unusable}")
        self.device = torch.device(self.found.device_type)
        self.seed: int = job["seed"]
        self.why_not: list[str | None] = []
        self.cases: list[tuple[int, Case]] = []
        self._implementations: list[Implementation] = []
        registry = get_default_manager().registry
        get_default_manager().ensure_initialized()
        for number, (op, impl_id) in enumerate(job["targets"]):
            impl, reference = (registry.get_implementation(op, name) for name in (impl_id, _REFERENCE))
            if impl is None:
                raise LookupError(f"{op} has no implementation {impl_id} in the checking process")
            why, cases = self._cases_of(impl, quick=job["quick"])
            self.why_not.append(why)
            self.cases += [(number, case) for case in cases]
            other = None if reference is None or impl_id == _REFERENCE else reference.function
            self._implementations.append(
                Implementation(
                    op,
                    impl.function,
                    other,
                    self.device,
                    writes_inputs=impl.writes_inputs,
                    in_float64=lambda begins: send({IN_FLOAT64: begins}),
                )
            )

    def _cases_of(self, impl: OpImpl, *, quick: bool) -> tuple[str | None, list[Case]]:
        """An implementation's cases; or none, and why."""
        if impl.op_name not in OPERATORS_CHECKED:
            return f"sglang-fl {__version__} has no operator {impl.op_name}, and so no check of it", []
        why = impl.why_unavailable()
        if why is not None:
            return why, []
        try:
            cases = list(cases_of(impl.op_name, impl.dtypes(), self.device, quick=quick, batch_invariant=impl.batch_invariant))
        except ValueError as error:
            return str(error), []
        return (None if cases else f"it takes none of {', '.join(map(str, DTYPES))}"), cases

    def hello(self) -> dict[str, Any]:
        cases = [{"target": number, "check": case.check, "name": case.name, "dtype": case.dtype} for number, case in self.cases]
        return {"machine": self._machine(), "versions": _versions(), "why_not": self.why_not, "cases": cases}

    def _machine(self) -> dict[str, str]:
        module = getattr(torch, self.device.type, None)
        name = module.get_device_name() if hasattr(module, "get_device_name") else _processor()  # type: ignore[union-attr]
        return {
            "device": f"{name} ({self.device.type})",
            "vendor": f"{self.found.vendor} ({self.found.evidence})",
            "system": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        }

    def run(self, number: int) -> Outcome:
        target, case = self.cases[number]
        return check_case(self._implementations[target], case, self.seed + number)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")


def _versions() -> dict[str, str]:
    found = {"sglang-fl": __version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _answer(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """An outcome that JSON can hold: it has no infinity."""
    numbers = {name: None for name, x in asdict(outcome).items() if isinstance(x, float) and not math.isfinite(x)}
    return {**asdict(outcome), **numbers, "seconds": round(seconds, 3)}


def _requests() -> Iterator[int]:
    """Numbers of cases, until the input ends; then the process ends, whatever it is doing."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            waiting.put(int(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield waiting.get()


def main(results_fd: int, job: Mapping[str, Any]) -> None:
    faulthandler.enable()
    os.set_inheritable(results_fd, False)
    with os.fdopen(results_fd, "w", encoding="utf-8") as out:

        def send(message: Mapping[str, Any]) -> None:
            print(json.dumps(message), file=out, flush=True)

        worker = Worker(job, send)
        send(worker.hello())
        for number in _requests():
            start = time.monotonic()
            outcome = worker.run(number)
            send(_answer(outcome, time.monotonic() - start))


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
