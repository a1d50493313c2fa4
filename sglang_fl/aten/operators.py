# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own operators (ATen), replaced by FlagGems's kernels in this process.

FlagGems registers its functions with PyTorch's dispatcher, for the device's key. What was registered, and
what was not and why, is in an :class:`AtenReport`. Each function has a ``torch.library.Library`` of its own, so that it can be
switched alone.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType, TracebackType
from typing import Any, ClassVar

import torch

from ..config import Settings
from ..dispatch.backends.flaggems.library import load
from ..trial import TO_TRY_AGAIN
from ..utils.suggest import suggest
from .native import native_kernel
from .recorder import Recorder
from .trials import Trials

logger = logging.getLogger("sglang_fl.aten")

Function = Callable[..., Any]
#: (FlagGems function, ATen operator, the function itself, what is registered for it, PyTorch's kernel) -> what is registered instead.
Around = Callable[[str, str, Function, Function, Function | None], Function]

_UNKNOWN_OPERATOR = "this PyTorch has no such operator"


@dataclass(frozen=True)
class AtenReport:
    """What Layer 1 did.

    Attributes:
        replaced: (ATen operator, FlagGems function), as in ``("mul.Tensor", "mul")``.
        left: (ATen operator, FlagGems function, reason) of what FlagGems has and PyTorch keeps.
        off: why the layer is off as a whole, or None.
        in_graphs: whether FlagGems's functions are in force only where SGLang captures a graph.
    """

    replaced: tuple[tuple[str, str], ...] = ()
    left: tuple[tuple[str, str, str], ...] = ()
    off: str | None = None
    in_graphs: bool = False

    def summary(self) -> str:
        """One line for the server's log."""
        if self.off is not None:
            return f"sglang-fl: no ATen operator is replaced: {self.off}"
        functions = {function for _, function in self.replaced}
        where = " in graphs" if self.in_graphs else ""
        return (
            f"sglang-fl: FlagGems replaces {len(self.replaced)} ATen operators with {len(functions)} functions{where}, "
            f"{len(self.left)} left"
        )

    def left_by_reason(self) -> dict[str, list[str]]:
        """Reason -> the FlagGems functions that were left for it."""
        reasons: dict[str, dict[str, None]] = {}
        for _, function, reason in self.left:
            reasons.setdefault(reason, {})[function] = None
        return {reason: list(functions) for reason, functions in reasons.items()}


class AtenOperators:
    """The ATen operators that the settings give to FlagGems: on and off, as often as needed, together or function by function.

    Usable in a ``with`` statement. One set at a time is on in a process.
    """

    _on: ClassVar["AtenOperators | None"] = None

    def __init__(self, settings: Settings, trials: Trials | None = None, excluded: Mapping[str, str] | None = None):
        """
        Args:
            trials: of the functions' first calls; None: they are registered as they are.
            excluded: FlagGems function -> why it is left out, beside what the settings say.
        """
        self.settings = settings
        self.report = AtenReport()
        self.trials = trials
        #: Called when functions were given back to PyTorch after they had been in force.
        self.changed: Callable[[], object] = lambda: None
        if trials is not None:
            trials.gave_way = self._gave_way
        self._excluded = dict(excluded or {})
        self._registrar: Any = None
        #: FlagGems function -> the ATen operators that it replaces, each with the function itself.
        self._functions: dict[str, list[tuple[str, Function]]] = {}
        #: ATen operator -> the wrapper registered for it during trials.
        self._tried: dict[str, Function] = {}
        #: ATen operator -> what is registered for it once its first call went well.
        self._served: dict[str, Function] = {}
        #: ATen operator -> PyTorch's own kernel, where it can be kept callable.
        self._kernels: dict[str, Function | None] = {}
        self._around: Around | None = None
        #: Operators that are registered as they serve, after their first call went well.
        self._passed: frozenset[str] = frozenset()
        self._libraries: dict[str, torch.library.Library] = {}

    def enable(self) -> AtenReport:
        """Register FlagGems's functions with PyTorch, from the next call of an operator on. The first time costs FlagGems's import.

        Raises:
            RuntimeError: another set of operators is on; FlagGems finds no device; under ``strict``, an
                operator could not be registered, or one that the settings list is not replaced.
            ImportError: FlagGems is not installed.
        """
        if AtenOperators._on is self:
            return self.report
        if AtenOperators._on is not None:
            raise RuntimeError("another set of ATen operators is replaced already; disable() it first")
        AtenOperators._on = self
        is_first = self._registrar is None
        try:
            if is_first:
                self._enable_first()
            else:
                for function in self._functions:
                    self._register(function)
        except BaseException:
            self.disable()
            if is_first:
                self._registrar = None  # FlagGems is asked anew the next time
            raise
        return self.report

    def disable(self) -> None:
        """Give every operator back to PyTorch."""
        if AtenOperators._on is not self:
            return
        for function in list(self._libraries):
            self._libraries.pop(function)._destroy()
        AtenOperators._on = None

    def switch(self, function: str, on: bool) -> None:
        """Switch a single FlagGems function, with all ATen operators that it replaces, while this set is on.

        Raises:
            RuntimeError: the set is off, or PyTorch does not take the function.
            ValueError: the set has no such function.
        """
        if AtenOperators._on is not self:
            raise RuntimeError("this set of ATen operators is off; enable() it first")
        if function not in self._functions:
            raise ValueError(f"FlagGems replaces nothing with {function!r} here{suggest(function, list(self._functions))}")
        if on and function not in self._libraries:
            if failed := self._register(function):
                self._libraries.pop(function)._destroy()
                raise RuntimeError("; ".join(f"aten::{key}: {reason}" for key, reason in failed.items()))
        elif not on and function in self._libraries:
            self._libraries.pop(function)._destroy()

    @property
    def functions(self) -> dict[str, list[str]]:
        """FlagGems function -> the ATen operators that it replaces here."""
        return {function: [key for key, _ in rows] for function, rows in self._functions.items()}

    def observe(self, around: Around | None) -> None:
        """From now on register what ``around`` makes of each function; None: the functions as they are. Those that are on stay on."""
        self._around = around
        for function in list(self._libraries):
            self._libraries.pop(function)._destroy()
            self._register(function)

    @property
    def excluded(self) -> Mapping[str, str]:
        """FlagGems function -> why it is left out, beside what the settings say."""
        return self._excluded

    def exclude(self, function: str, reason: str) -> None:
        """Give a function's operators back to PyTorch for good. Not to be called while one of them runs."""
        if (library := self._libraries.pop(function, None)) is not None:
            library._destroy()
        self._excluded[function] = reason
        self._left({key for key, _ in self._functions.pop(function, ())}, reason)

    def _gave_way(self, key: str, reason: str) -> None:
        """PyTorch's kernel takes an operator's calls from now on."""
        self._left({key}, reason)
        self.changed()

    def _left(self, keys: Set[str], reason: str) -> None:
        """Report that PyTorch has these operators again, those of them that it did not have already."""
        kept = tuple(row for row in self.report.replaced if row[0] not in keys)
        rows = [(key, function, reason) for key, function in self.report.replaced if key in keys]
        self.report = replace(self.report, replaced=kept, left=(*self.report.left, *rows))

    def register_passed(self) -> None:
        """Register FlagGems's functions as they serve where their first call went well. Not to be called while one of them runs."""
        if self.trials is not None:
            self._register_as_passed(frozenset(self.trials.passed))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Register all of them with the wrapper used during trials."""
        if AtenOperators._on is not self:
            with self:
                yield
            return
        before = self._passed
        self._register_as_passed(frozenset())
        try:
            yield
        finally:
            self._register_as_passed(before)

    def _register_as_passed(self, keys: frozenset[str]) -> None:
        """Without the wrapper used during trials, for these operators alone."""
        changed, self._passed = keys ^ self._passed, keys
        for function, rows in self._functions.items():
            if function in self._libraries and any(key in changed for key, _ in rows):
                self._libraries.pop(function)._destroy()
                self._register(function)

    def __enter__(self) -> AtenReport:
        return self.enable()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.disable()

    def _enable_first(self) -> None:
        """Ask FlagGems what it has here, register it, and report what became of each operator."""
        gems = load()
        collected = _collect(gems, self.settings)
        self._registrar = gems.current_work_registrar
        failed: dict[str, str] = {}
        self._functions = {}
        for key, fn in collected:
            # PyTorch takes a kernel for an operator that it does not have, and never calls it.
            if not torch._C._dispatch_has_kernel(f"aten::{key}"):
                failed[key] = _UNKNOWN_OPERATOR
            elif fn.__name__ in self._excluded:
                failed[key] = self._excluded[fn.__name__]
            else:
                self._functions.setdefault(fn.__name__, []).append((key, fn))
        if self.trials is not None:
            for function, rows in self._functions.items():
                for key, fn in rows:
                    kernel = self._kernels[key] = native_kernel(key, self._registrar.reg_key)
                    self._tried[key] = self.trials.tried(function, key, fn, kernel)
                    self._served[key] = self.trials.served(function, key, fn, kernel, strict=self.settings.strict)
        for function, rows in self._functions.items():
            failed |= (refused := self._register(function))
            self._functions[function] = [(key, fn) for key, fn in rows if key not in refused]
        replaced = {key: name for name, rows in self._functions.items() for key, _ in rows}
        left = [
            (key, function, failed.get(key) or _exclusion_reason(gems, self.settings, key, function))
            for function, rows in gems.FULL_CONFIG_BY_FUNC.items()
            for key, *_ in rows
            if key not in replaced
        ]
        self._check_left(left, failed)
        self.report = AtenReport(tuple(replaced.items()), tuple(left))

    def _register(self, function: str) -> dict[str, str]:
        """Register a function. Returns those of its operators that PyTorch does not take, with the reason."""
        registrar, failed = self._registrar, {}
        registrar.lib = library = torch.library.Library("aten", "IMPL")
        try:
            for key, fn in self._functions[function]:
                try:
                    registrar.register(key, self._registered(function, key, fn))
                except Exception as error:
                    failed[key] = f"it could not be registered: {error}"
        except BaseException:
            library._destroy()
            raise
        self._libraries[function] = library
        return failed

    def _registered(self, function: str, key: str, fn: Function) -> Function:
        if key not in self._passed:
            registered = self._tried.get(key, fn)
        elif self._around is None:
            registered = self._served.get(key, fn)
        else:
            registered = fn  # whoever observes it sees its errors
        return registered if self._around is None else self._around(function, key, fn, registered, self._kernels.get(key))

    def _check_left(self, left: list[tuple[str, str, str]], failed: dict[str, str]) -> None:
        """Warn of operators that the settings list and PyTorch keeps, and of failed registrations; under ``strict``, raise."""
        settings = self.settings
        listed = settings.flagos_functions or ()
        for key, function, reason in left:
            if function in self._excluded:
                if settings.strict and key in failed:
                    why = f"{function} ended an earlier start: {reason} (strict is set, so there is no fallback)"
                    raise RuntimeError(f"sglang-fl: aten::{key}: {why}. {TO_TRY_AGAIN}")
                continue  # whoever excluded it has said so
            if function in listed or (key in failed and reason != _UNKNOWN_OPERATOR):
                by = f" ({settings.source(settings.flagos_key)} names {function})" if function in listed else ""
                message = f"aten::{key}: {reason}; PyTorch's own kernel is used{by}"
                if settings.strict:
                    raise RuntimeError(f"sglang-fl: {message} (strict is set)")
                logger.warning(message)


def available_functions(settings: Settings) -> tuple[list[tuple[str, Function]], str]:
    """What FlagGems could replace here if all of it were asked for: (ATen operator, function), and the dispatch key that it registers for.

    Raises:
        ImportError: FlagGems is not installed.
    """
    gems = load()
    found = _collect(gems, unlisted(settings))
    known = [(key, fn) for key, fn in found if torch._C._dispatch_has_kernel(f"aten::{key}")]
    return known, str(gems.current_work_registrar.reg_key)


def unlisted(settings: Settings) -> Settings:
    """The same settings without the lists of FlagGems functions, so that all are selected."""
    return replace(settings, flagos_whitelist=None, flagos_blacklist=None, flagos_faster=None, flagos_broken=None, flagos_slower=None)


def _collect(gems: ModuleType, settings: Settings) -> list[tuple[str, Function]]:
    """What FlagGems would register of what the settings select: (ATen operator, function). Nothing is registered yet."""
    collected: list[tuple[str, Function]] = []
    recorder = Recorder(settings) if settings.flaggems_record else None

    class Registrar(gems.registrar):  # type: ignore[name-defined]
        """FlagGems's own, which is asked later, for each function."""

        def register_impl(self, key: str, fn: Function) -> None:
            collected.append((key, recorder.recording(key, fn) if recorder else fn))

        def register(self, key: str, fn: Function) -> None:
            super().register_impl(key, fn)

    selected = settings.flagos_functions
    if selected is not None:
        gems.only_enable(lib=None, include=list(selected), registrar=Registrar)
    else:
        excluded = [function for function in gems.FULL_CONFIG_BY_FUNC if settings.flagos_exclusion_reason(function)]
        gems.enable(lib=None, unused=excluded, registrar=Registrar)
    return collected


def _exclusion_reason(gems: ModuleType, settings: Settings, key: str, function: str) -> str:
    """Why an operator that was not registered stays with PyTorch."""
    reason = settings.flagos_exclusion_reason(function)
    if reason is not None:
        return reason
    if function in gems.current_work_registrar.get_unused_ops():
        return f"FlagGems disables it on {gems.vendor_name}"
    if key in gems.current_work_registrar.cpp_patched_ops:
        return "FlagGems's C++ extension provides it"
    return "FlagGems does not register it with this PyTorch"
