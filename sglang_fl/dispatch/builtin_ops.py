# SPDX-License-Identifier: Apache-2.0
"""Finds every backend and lets it register its implementations.

Backends are found in three places: the folders under ``backends/`` and ``backends/vendor/``, installed
packages with an entry point in the group ``sglang_fl.plugin``, and the modules that
SGLANG_FL_PLUGIN_MODULES names. One that fails is kept with its reason, and the rest goes on.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

from .logger_manager import get_logger
from .registry import OpRegistry

ENTRY_POINT_GROUP = "sglang_fl.plugin"
_BACKENDS = f"{__package__}.backends"
_NOT_BACKENDS = frozenset({"vendor", "template"})

logger = get_logger()


@dataclass(frozen=True)
class Failure:
    """A backend that could not be registered, and why."""

    origin: str
    reason: str


@dataclass
class Discovery:
    """What was found: the origins that registered, and those that failed."""

    loaded: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)


def _folders(package: str) -> Iterator[str]:
    """Modules ``register_ops`` of the folders of a package, found without importing them."""
    root = Path(__file__).parent.joinpath(*package.removeprefix(f"{__package__}.").split("."))
    for module in pkgutil.iter_modules([str(root)]):
        if module.ispkg and module.name not in _NOT_BACKENDS and (root / module.name / "register_ops.py").exists():
            yield f"{package}.{module.name}.register_ops"


def discover(registry: OpRegistry, plugin_modules: Sequence[str] = ()) -> Discovery:
    """Register every backend there is."""
    found = Discovery()
    for module in [*_folders(_BACKENDS), *_folders(f"{_BACKENDS}.vendor")]:
        _register(found, registry, module.removesuffix(".register_ops"), _from_module(module))
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        origin = f"{entry.dist.name} (entry point {entry.name})" if entry.dist else f"entry point {entry.name}"
        _register(found, registry, origin, entry.load)
    for name in plugin_modules:
        _register(found, registry, f"{name} (SGLANG_FL_PLUGIN_MODULES)", _from_module(name))
    return found


def _from_module(name: str) -> Callable[[], Callable[[OpRegistry], None]]:
    def load() -> Callable[[OpRegistry], None]:
        register: Callable[[OpRegistry], None] = importlib.import_module(name).register_builtins
        return register

    return load


def _register(found: Discovery, registry: OpRegistry, origin: str, load: Callable[[], Callable[[OpRegistry], None]]) -> None:
    """All of a backend's implementations, or none of them."""
    attempt = OpRegistry()
    try:
        load()(attempt)
        registry.register_many([impl for impls in attempt.snapshot().impls_by_op.values() for impl in impls])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        found.failed.append(Failure(origin, reason))
        logger.warning("backend %s could not be registered: %s", origin, reason)
        logger.debug("backend %s", origin, exc_info=True)
    else:
        found.loaded.append(origin)


def register_builtins(registry: OpRegistry) -> None:
    """Register the backends of this package, installed packages included."""
    discover(registry)
