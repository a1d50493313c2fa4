# SPDX-License-Identifier: Apache-2.0
"""Counts how often SGLang's processes call its kernels, without changing SGLang.

Python's profiler sees each call of a Python function, so a traced server is slower. Counted are launches (``kernel[grid]``), calls of
functions of ``sglang.kernels`` from other modules, and calls of their replacements. Graph replays are not counted.
"""

import atexit
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from .places import KernelHook

#: The folder where each process writes its counts. ``sglang-fl kernels --trace`` sets it for its server.
VARIABLE = "_SGLANG_FL_KERNEL_TRACE"
ROOM = "sglang.kernels."
#: Functions of these modules are skipped between caller and callee: SGLang's decorators, and a hook without effect.
_BETWEEN = ("sglang.kernels.kernel_api_logging", "sglang.kernels.jit.utils", KernelHook.__module__)
_LAUNCH, _HOOK = "__getitem__", KernelHook.__call__.__code__
SECONDS_BETWEEN_WRITES = 0.5


class Trace:
    """The counts of this process, by ``module:name``."""

    def __init__(self, folder: Path):
        self._path = folder / f"{os.getpid()}.json"
        self._counts: Counter[str] = Counter()
        #: Code object -> what it is: a function of SGLang's kernels, a launch, or neither.
        self._kinds: dict[CodeType, str] = {}
        self._written = 0

    def start(self) -> None:
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)
        atexit.register(self._write)
        threading.Thread(target=self._write_now_and_then, daemon=True, name="sglang-fl kernel trace").start()

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        kind = self._kinds.get(code)
        if kind is None:
            kind = self._kinds[code] = _kind_of(frame)
        if not kind:
            return
        if code.co_name == _LAUNCH:
            name = _launched(frame.f_locals.get("self"))
        elif code is _HOOK:
            name = _replaced(frame.f_locals["self"])
        else:
            name = kind if _is_called_from_elsewhere(frame) else ""
        if name:
            self._counts[name] += 1
            if self._counts[name] == 1:
                self._write()  # the process may end in this call

    def _write(self) -> None:
        counts = dict(self._counts)
        total = sum(counts.values())
        if total != self._written:
            scratch = self._path.with_suffix(".new")
            scratch.write_text(json.dumps(counts))
            scratch.replace(self._path)
            self._written = total

    def _write_now_and_then(self) -> None:
        sys.setprofile(None)
        while True:
            time.sleep(SECONDS_BETWEEN_WRITES)
            self._write()


def _kind_of(frame: FrameType) -> str:
    code = frame.f_code
    if code.co_name == _LAUNCH or code is _HOOK:
        return code.co_name
    module = _module(frame)
    is_function = module.startswith(ROOM) and code.co_qualname.isidentifier()
    return f"{module}:{code.co_name}" if is_function else ""


def _launched(kernel: Any) -> str:
    """The name of the kernel that ``kernel[grid]`` launches, without autotuner, heuristics or interpreter. Empty: not SGLang's."""
    if isinstance(kernel, KernelHook):
        return _replaced(kernel)
    while kernel is not None and not hasattr(kernel, "__code__"):
        kernel = getattr(kernel, "fn", None)
    return _name(kernel)


def _replaced(hook: KernelHook) -> str:
    """The name of the kernel that a hook replaces. Empty if SGLang's own runs, which is counted itself."""
    return "" if hook.forward is None else _launched(hook.own)


def _name(function: Any) -> str:
    module = getattr(function, "__module__", None) or ""
    return f"{module}:{function.__name__}" if module.startswith("sglang.") else ""


def _is_called_from_elsewhere(frame: FrameType) -> bool:
    """Whether the caller is outside of ``sglang.kernels`` and of Triton's interpreter, which calls a kernel's own function."""
    caller = frame.f_back
    while caller is not None and _module(caller).startswith(_BETWEEN):
        caller = caller.f_back
    return caller is None or not _module(caller).startswith((ROOM, "triton."))


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__") or ""


def start_if_asked() -> None:
    """Start counting if asked. Called in each process of SGLang while it loads its plugins."""
    folder = os.environ.get(VARIABLE)
    if folder:
        Trace(Path(folder)).start()


def total(folder: Path) -> Counter[str]:
    """The sum of the counts that processes wrote into a folder."""
    counts: Counter[str] = Counter()
    for file in folder.glob("*.json"):
        counts.update(json.loads(file.read_text()))
    return counts
