# SPDX-License-Identifier: Apache-2.0
"""Layer 1: PyTorch's own operators (ATen), replaced by FlagGems's kernels in this process.

FlagGems registers its functions with PyTorch's dispatcher, for the device's key. What was registered, and
what was not and why, is in an :class:`AtenReport`.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch

from .config import Settings
from .config.settings import PROFILE
from .device import Device
from .dispatch.backends.flaggems.library import NOT_INSTALLED, load, why_not_here

logger = logging.getLogger("sglang_fl.aten")

Function = Callable[..., Any]

_UNKNOWN_OPERATOR = "this PyTorch has no such operator"


@dataclass(frozen=True)
class AtenReport:
    """What Layer 1 did.

    Attributes:
        replaced: (ATen operator, FlagGems function), as in ``("mul.Tensor", "mul")``.
        left: (ATen operator, FlagGems function, reason) of what FlagGems has and PyTorch keeps.
        off: why the layer is off as a whole, or None.
    """

    replaced: tuple[tuple[str, str], ...] = ()
    left: tuple[tuple[str, str, str], ...] = ()
    off: str | None = None

    def summary(self) -> str:
        """One line for the server's log."""
        if self.off is not None:
            return f"sglang-fl: no ATen operator is replaced: {self.off}"
        functions = {function for _, function in self.replaced}
        return f"sglang-fl: FlagGems replaces {len(self.replaced)} ATen operators with {len(functions)} functions, {len(self.left)} left"

    def left_by_reason(self) -> dict[str, list[str]]:
        """Reason -> the FlagGems functions that were left for it."""
        reasons: dict[str, dict[str, None]] = {}
        for _, function, reason in self.left:
            reasons.setdefault(reason, {})[function] = None
        return {reason: list(functions) for reason, functions in reasons.items()}


_operators: "AtenOperators | None" = None


def replace_operators(settings: Settings, device: Device, *, deterministic: bool = False) -> AtenReport:
    """Switch Layer 1 on in a process that runs a model, if the settings ask for it. With other settings than
    the last time, what was on before is switched off first.

    Raises:
        RuntimeError: another :class:`AtenOperators` is on; under ``strict``, FlagGems or an operator cannot be used, or a
            user asks for FlagGems where it is not installed.
    """
    global _operators
    if settings.flaggems_log_path and not settings.flaggems_record:
        logger.warning("SGLANG_FLAGGEMS_LOG_PATH is set, and SGLANG_FLAGGEMS_RECORD is not: nothing will be recorded")
    off = why_off(settings, device, deterministic=deterministic)
    if off is not None:
        restore_operators()
        asked = settings.source("flagos_whitelist").precedence > PROFILE or settings.source("use_flaggems").precedence > PROFILE
        if settings.strict and off == NOT_INSTALLED and asked:
            raise RuntimeError(f"sglang-fl: no ATen operator is replaced: {off} (strict is set)")
        return AtenReport(off=off)
    if _operators is not None and _operators.settings != settings:
        restore_operators()
    if _operators is None:
        operators = AtenOperators(settings)
        try:
            operators.enable()
        except Exception as error:
            if settings.strict or AtenOperators._on is not None:
                raise
            message = f"FlagGems could not be switched on: {type(error).__name__}: {error}"
            logger.warning(message, exc_info=True)
            return AtenReport(off=message)
        _operators = operators
    return _operators.report


def restore_operators() -> None:
    """Switch Layer 1 off again in this process."""
    global _operators
    if _operators is not None:
        _operators.disable()
        _operators = None


def why_off(settings: Settings, device: Device, *, deterministic: bool = False) -> str | None:
    """Why no ATen operator is to be replaced, or None. FlagGems is not imported to find out.

    Args:
        deterministic: the server runs with ``--enable-deterministic-inference``, and no FlagGems
            function is declared batch-invariant.
    """
    if not settings.use_flaggems:
        return f"USE_FLAGGEMS=0 ({settings.source('use_flaggems')})"
    if settings.flagos_functions == ():
        key = settings.flagos_key
        state = "names only excluded functions" if getattr(settings, key) else "is empty"
        return f"{key} {state} ({settings.source(key)})"
    if deterministic:
        return "deterministic mode"
    return why_not_here(device)


class AtenOperators:
    """The ATen operators that the settings give to FlagGems: on and off, as often as needed.

    Usable in a ``with`` statement. One at a time is on in a process.
    """

    _on: "AtenOperators | None" = None

    def __init__(self, settings: Settings):
        self.settings = settings
        self.report = AtenReport()
        self._library: torch.library.Library | None = None

    def enable(self) -> AtenReport:
        """Register FlagGems's functions with PyTorch, from the next call of an operator on.

        Raises:
            RuntimeError: another set of operators is on; FlagGems finds no device; under ``strict``, an
                operator could not be registered, or one that the settings list is not replaced.
            ImportError: FlagGems is not installed.
        """
        if AtenOperators._on is self:
            return self.report
        if AtenOperators._on is not None:
            raise RuntimeError("another set of ATen operators is replaced already; disable() it first")
        gems = load()
        self._library = torch.library.Library("aten", "IMPL")
        AtenOperators._on = self
        try:
            replaced, failed = _register(gems, self.settings, self._library)
            left = [
                (key, function, failed.get(key) or _exclusion_reason(gems, self.settings, key, function))
                for function, rows in gems.FULL_CONFIG_BY_FUNC.items()
                for key, *_ in rows
                if key not in replaced
            ]
            self._check_left(left, failed)
        except BaseException:
            self.disable()
            raise
        self.report = AtenReport(tuple(replaced.items()), tuple(left))
        return self.report

    def disable(self) -> None:
        """Give every operator back to PyTorch."""
        if AtenOperators._on is not self:
            return
        assert self._library is not None
        self._library._destroy()
        self._library = None
        AtenOperators._on = None

    def __enter__(self) -> AtenReport:
        return self.enable()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.disable()

    def _check_left(self, left: list[tuple[str, str, str]], failed: dict[str, str]) -> None:
        """Warn of operators that the settings list and PyTorch keeps, and of failed registrations; under ``strict``, raise."""
        settings = self.settings
        listed = settings.flagos_functions or ()
        for key, function, reason in left:
            if function in listed or (key in failed and reason != _UNKNOWN_OPERATOR):
                by = f" ({settings.source(settings.flagos_key)} names {function})" if function in listed else ""
                message = f"aten::{key}: {reason}; PyTorch's own kernel is used{by}"
                if settings.strict:
                    raise RuntimeError(f"sglang-fl: {message} (strict is set)")
                logger.warning(message)


def _register(gems: ModuleType, settings: Settings, library: torch.library.Library) -> tuple[dict[str, str], dict[str, str]]:
    """Register what the settings select.

    Returns:
        ATen operator -> FlagGems function of what was replaced, and ATen operator -> reason of what failed.
    """
    replaced: dict[str, str] = {}
    failed: dict[str, str] = {}
    recorder = Recorder(settings) if settings.flaggems_record else None

    class Registrar(gems.registrar):  # type: ignore[name-defined]
        """FlagGems's own, noting what became of each operator."""

        def register_impl(self, key: str, fn: Function) -> None:
            # PyTorch takes a kernel for an operator that it does not have, and never calls it.
            if not torch._C._dispatch_has_kernel(f"aten::{key}"):
                failed[key] = _UNKNOWN_OPERATOR
                return
            try:
                super().register_impl(key, recorder.recording(key, fn) if recorder else fn)
            except Exception as error:
                failed[key] = f"it could not be registered: {error}"
            else:
                replaced[key] = fn.__name__

    selected = settings.flagos_functions
    if selected is not None:
        gems.only_enable(lib=library, include=list(selected), registrar=Registrar)
    else:
        excluded = [function for function in gems.FULL_CONFIG_BY_FUNC if settings.flagos_exclusion_reason(function)]
        gems.enable(lib=library, unused=excluded, registrar=Registrar)
    return replaced, failed


def _exclusion_reason(gems: ModuleType, settings: Settings, key: str, function: str) -> str:
    """Why an operator whose registration was not tried stays with PyTorch."""
    reason = settings.flagos_exclusion_reason(function)
    if reason is not None:
        return reason
    if function in gems.current_work_registrar.get_unused_ops():
        return f"FlagGems leaves it out on {gems.vendor_name}"
    if key in gems.current_work_registrar.cpp_patched_ops:
        return "FlagGems's C++ extension has it"
    return "FlagGems's condition for it does not hold with this PyTorch"


class Recorder:
    """The log of replaced operators, as they run: Layer 1 alone, whoever else calls FlagGems.

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
