# SPDX-License-Identifier: Apache-2.0
"""Finds all backends, and registers their implementations.

Backends are found in three places: the folders under ``backends/`` and ``backends/vendor/`` that hold a
``register_ops.py``, installed packages with an entry point in the group ``sglang_fl.plugin``, and the modules that
SGLANG_FL_PLUGIN_MODULES names. A folder's and a module's function is ``register_builtins(registry)``; an entry point
is such a function under any name, or a module that has it. One that fails is kept with its reason, none of its
implementations is registered, and the rest goes on.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ..config import Words
from ..device import ALIASES, known_vendors
from ..kernels.places import problem_with
from ..utils.packages import entries, importing, last_line, origin_of
from .catalog import OPERATOR_OF_CLASS
from .kernel_implementations import is_kernel
from .kernel_implementations import register_builtins as register_kernels
from .logger_manager import get_logger
from .ops import OPERATORS
from .registry import OpRegistry

ENTRY_POINT_GROUP = "sglang_fl.plugin"
_BACKENDS = f"{__package__}.backends"
_NOT_BACKENDS = frozenset({"vendor", "template"})

logger = get_logger()

Register = Callable[[OpRegistry], None]


@dataclass(frozen=True)
class Failure:
    """A backend that could not be registered, and why. ``module`` is its name in SGLANG_FL_PLUGIN_MODULES, if it is there."""

    origin: str
    reason: str
    module: str | None = None


@dataclass
class Discovery:
    """What was found: the origins that registered, those that failed, and a sentence for each id that two claim."""

    loaded: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    #: Of backends that registered: nothing at all, or an operator whose name is nearly one of ours.
    warnings: list[str] = field(default_factory=list)
    functions: list[Register] = field(default_factory=list)
    #: (operator, implementation id) -> the origin that registered it.
    owners: dict[tuple[str, str], str] = field(default_factory=dict)


def discover(registry: OpRegistry, plugin_modules: Sequence[str] = ()) -> Discovery:
    """Register every backend there is, all of them at once when all have been asked."""
    there = registry.snapshot().impls_by_op
    found = Discovery(owners={(op, impl.impl_id): "this program" for op, impls in there.items() for impl in impls})
    asked = OpRegistry()
    for module in [*_folders(_BACKENDS), *_folders(f"{_BACKENDS}.vendor")]:
        _register(found, asked, module.removesuffix(".register_ops"), partial(importlib.import_module, module))
    _register(found, asked, "SGLang's own kernels", lambda: register_kernels)
    for entry in entries(ENTRY_POINT_GROUP):
        _register(found, asked, origin_of(entry), entry.load)
    for name in plugin_modules:
        _register(found, asked, f"{name} (SGLANG_FL_PLUGIN_MODULES)", partial(importlib.import_module, name), module=name)
    registry.register_many(asked.implementations())
    return found


def register_builtins(registry: OpRegistry) -> None:
    """Register the backends of this package, installed packages included.

    Raises:
        RuntimeError: two of them claim one implementation id.
    """
    found = discover(registry)
    if found.conflicts:
        raise RuntimeError("; ".join(found.conflicts))


def known_words(registry: OpRegistry | None = None) -> Words:
    """The names of operators, vendors and implementations: this package's, and those that are registered."""
    impls = registry.implementations() if registry is not None else []
    return Words(
        operators=frozenset(OPERATORS).union(impl.op_name for impl in impls),
        vendors=frozenset(known_vendors().keys() | ALIASES.keys()).union(impl.vendor for impl in impls if impl.vendor),
        impls=frozenset(impl.impl_id for impl in impls),
        operator_of=OPERATOR_OF_CLASS,
        has_kernel=lambda name: is_kernel(name) and problem_with(name) is None,
    )


def _folders(package: str) -> Iterator[str]:
    """Modules ``register_ops`` of the folders of a package, found without importing them."""
    root = Path(__file__).parent.joinpath(*package.removeprefix(f"{__package__}.").split("."))
    for file in sorted(root.glob("*/register_ops.py")):
        if file.parent.name not in _NOT_BACKENDS:
            yield f"{package}.{file.parent.name}.register_ops"


def _function(loaded: Any) -> Register:
    """The function that registers.

    Raises:
        TypeError: there is none in what an entry point or a module's name leads to.
    """
    function = getattr(loaded, "register_builtins", None) if isinstance(loaded, ModuleType) else loaded
    if isinstance(loaded, ModuleType) and function is None:
        raise TypeError(f"module {loaded.__name__} has no register_builtins(registry)")
    if not callable(function):
        raise TypeError(f"{function!r} is not a function that takes the registry")
    return function


def _register(found: Discovery, registry: OpRegistry, origin: str, load: Callable[[], Any], module: str | None = None) -> None:
    """All of a backend's implementations, or none of them. What was registered under another name already is left."""
    attempt = OpRegistry()
    try:
        with importing(origin):
            function = _function(load())
            if function in found.functions:
                return
            function(attempt)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A package that exits at import (a missing licence, a driver's check) is not our exit.
        reason = last_line(error)
        found.failed.append(Failure(origin, reason, module))
        logger.warning("backend %s could not be registered: %s", origin, reason)
        logger.debug("backend %s", origin, exc_info=True)
        return
    impls = attempt.implementations()
    claimed = [impl for impl in impls if (impl.op_name, impl.impl_id) in found.owners]
    for impl in claimed:
        first = found.owners[impl.op_name, impl.impl_id]
        found.conflicts.append(f"{impl.op_name}: both {first} and {origin} register {impl.impl_id}; only one can be in use")
    if claimed:
        logger.error("backend %s is not in use: %s", origin, "; ".join(found.conflicts[-len(claimed) :]))
        return
    registry.register_many(impls)
    found.functions.append(function)
    found.owners.update({(impl.op_name, impl.impl_id): origin for impl in impls})
    found.loaded.append(origin)
    for message in _doubts(origin, {impl.op_name for impl in impls}):
        logger.warning("%s", message)
        found.warnings.append(message)


def _doubts(origin: str, ops: set[str]) -> Iterator[str]:
    """A package may have its own operators; a name that is nearly one of ours is probably a misspelling."""
    if not ops:
        yield f"{origin} registers nothing: its function returned without a call of registry.register_impl or register_many"
    for op in sorted(ops - set(OPERATORS)):
        for meant in get_close_matches(op.lower(), OPERATORS, n=1, cutoff=0.85):
            yield f"{origin} registers an operator {op!r}, which no layer of SGLang runs on; did you mean {meant!r}?"
