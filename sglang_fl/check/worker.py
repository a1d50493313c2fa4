# SPDX-License-Identifier: Apache-2.0
"""The process that implementations run in, started by ``runner``.

It sends the machine, the versions and the cases. Then it answers each case's number with the outcome, preceded by its phases.
"""

import contextlib
import ctypes
import faulthandler
import math
import os
import platform
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..device import Device, detect, why_unusable
from ..dispatch.manager import get_default_manager
from ..dispatch.types import OpImpl
from ..platform.absent_packages import stand_in_for_absent_packages
from ..utils.child import connection_to_parent, receive, send
from ..utils.packages import installed_version
from .archive import write_archive
from .cases import OPERATORS_CHECKED, Case, cases_of
from .check_case import check_case
from .constants import DEVICE_LOST, FAILED, SERVING, SPEED, case_matches, case_name
from .implementation import Implementation
from .results import CaseResult
from .runner import Job

_PACKAGES = ("torch", "triton", "sglang", "flag_gems", "torch_npu")
_REFERENCE = "reference.torch"
#: The device memory that a worker keeps for its next case, in bytes.
_MOST_KEPT = 1 << 30


class Worker:
    """Has the implementations and their cases, cheap operators first.

    Args:
        send: sends a message to the runner.
    """

    def __init__(self, job: Job, send: Callable[[Any], None]):
        self.found: Device = detect()
        stand_in_for_absent_packages(self.found)  # for kernels that import SGLang
        unusable = why_unusable(torch, self.found.device_type)
        if unusable is not None:
            sys.exit(f"{self.found.vendor} ({self.found.evidence}): {unusable}")
        self.device = torch.device(self.found.device_type)
        self._module: Any = getattr(torch, self.device.type, None)
        self.job = job
        self.why_not: list[str | None] = []
        self._implementations: dict[tuple[str, str], tuple[OpImpl, Implementation]] = {}
        self._archived: set[tuple[tuple[str, str], str, str]] = set()
        found: list[tuple[CaseResult, Case]] = []
        registry = get_default_manager().registry
        get_default_manager().ensure_initialized()
        for op, impl_id in job.targets:
            impl, reference = (registry.get_implementation(op, name) for name in (impl_id, _REFERENCE))
            if impl is None:
                raise LookupError(f"{op} has no implementation {impl_id} in the checking process")
            why, cases = self._cases_of(impl)
            self.why_not.append(why)
            found += [(CaseResult(op=op, impl=impl_id, check=case.check, name=case.name, dtype=case.dtype), case) for case in cases]
            if cases:
                self._implementations[op, impl_id] = (
                    impl,
                    Implementation(
                        op,
                        _function_of(impl),
                        None if reference is None or impl_id == _REFERENCE else reference.function,
                        self.device,
                        writes_inputs=impl.writes_inputs,
                        enter=send,
                    ),
                )
        found.sort(key=lambda pair: (OPERATORS_CHECKED[pair[1].op].fewer, pair[1].op == "fused_moe"))
        self._cases = {result.key: (result, case) for result, case in found}

    def _cases_of(self, impl: OpImpl) -> tuple[str | None, Sequence[Case]]:
        """An implementation's cases, or none and the reason."""
        if impl.op_name not in OPERATORS_CHECKED:
            return f"sglang-fl {__version__} has no cases for {impl.op_name}", []
        why = impl.why_unavailable()
        if why is not None:
            return why, []
        asked = self.job.only
        lists = (True,) if self.job.quick else (False, True) if asked else (False,)
        try:
            cases = {_name(case): case for quick in lists for case in self._made(impl, quick)}
        except ValueError as error:
            return str(error), []
        if not cases:
            return f"it supports none of {', '.join(map(str, OPERATORS_CHECKED[impl.op_name].dtypes))}", []
        return None, [case for name, case in cases.items() if not asked or any(case_matches(name, words) for words in asked)]

    def _made(self, impl: OpImpl, quick: bool) -> Iterator[Case]:
        cases = list(cases_of(impl.op_name, impl.dtypes(), self.device, quick=quick, batch_invariant=impl.batch_invariant))
        yield from cases
        yield from (replace(case, check=SPEED) for case in cases if case.check == SERVING and case.dtype == cases[0].dtype)

    def hello(self) -> dict[str, Any]:
        return {
            "machine": self._machine(),
            "versions": self._versions(),
            "modules": sorted({impl.module for impl, _ in self._implementations.values()}),
            "why_not": self.why_not,
            "cases": [result for result, _ in self._cases.values()],
        }

    def _machine(self) -> dict[str, str]:
        module = self._module
        name = module.get_device_name() if hasattr(module, "get_device_name") else _processor()
        return {
            "device": f"{name} ({self.device.type})",
            "vendor": f"{self.found.vendor} ({self.found.evidence})",
            "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        }

    def _versions(self) -> dict[str, str]:
        found = {"sglang-fl": __version__, "Python": platform.python_version()}
        return found | {package: version for package in _PACKAGES if (version := installed_version(package)) is not None}

    def run(self, key: tuple[str, str]) -> CaseResult:
        """Run a case."""
        result, case = self._cases[key]
        start, (_, impl) = time.monotonic(), self._implementations[result.target]
        impl.compiling_s = 0.0
        # Repeating a case may crash this process.
        archive = self._archive(result, case) if self.job.only else ""
        outcome = check_case(impl, case, _seed(self.job.seed, case))
        if outcome.status != DEVICE_LOST and hasattr(self._module, "memory_reserved") and self._module.memory_reserved() > _MOST_KEPT:
            self._module.empty_cache()  # other workers need the memory
        if outcome.status == FAILED:
            archive = archive or self._archive(result, case)
        elif outcome.status != DEVICE_LOST and archive:
            Path(archive).unlink(missing_ok=True)
            archive = ""
        # JSON has no infinity.
        found: dict[str, Any] = {name: x for name, x in vars(outcome).items() if not isinstance(x, float) or math.isfinite(x)}
        found |= {"seconds": round(time.monotonic() - start, 3), "compiling_s": round(impl.compiling_s, 3), "archive": archive}
        return replace(result, **found)

    def _archive(self, result: CaseResult, case: Case) -> str:
        """The archive of a failing case, if it is the first of its kind. Else empty."""
        kind = result.target, case.check, case.dtype
        if self.job.archives is None or kind in self._archived:
            return ""
        self._archived.add(kind)
        impl, _ = self._implementations[result.target]
        try:
            return write_archive(self.job.archives.absolute(), impl, case, _seed(self.job.seed, case), self.device)
        except Exception as error:  # a layer may hold any object
            return f"not written: {type(error).__name__}: {error}"


def _function_of(impl: OpImpl) -> Callable[..., Any]:
    """An implementation's function. One that cannot be loaded fails each of its cases; what else is checked goes on."""
    try:
        return impl.function
    except Exception as error:
        message = f"its function cannot be used: {type(error).__name__}: {error}"

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError(message)  # a TypeError would be a refusal

    return fails


def _name(case: Case) -> str:
    return case_name(case.op, case.check, case.name, case.dtype)


def _seed(seed: int, case: Case) -> int:
    """The seed of a case: independent of what else is checked, and different for each case."""
    return (seed + zlib.crc32(_name(case).encode())) % 2**62


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")


def end_with_parent() -> None:
    """End this process when its parent ends.

    On Linux also while a hanging kernel blocks other Python threads. Elsewhere the process ends after its case.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def serve(worker_of: Callable[[Any, Callable[[Any], None]], Any]) -> None:
    """Answer the parent: with a greeting, and then with the outcome of each case that it asks for, by its number.

    Args:
        worker_of: makes the worker of the parent's job and of a function that sends a message.
    """
    end_with_parent()
    faulthandler.enable()
    connection = connection_to_parent()
    answer = partial(send, connection)
    worker = worker_of(receive(connection), answer)
    answer(worker.hello())
    with contextlib.suppress(EOFError):
        while True:
            answer(worker.run(receive(connection)))


if __name__ == "__main__":
    serve(Worker)
