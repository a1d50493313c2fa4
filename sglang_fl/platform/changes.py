# SPDX-License-Identifier: Apache-2.0
"""Changes to functions of SGLang by packages and vendors' folders: loading and logging them.

A package makes them through SGLang's own entry-point group ``sglang.srt.plugins`` and its HookRegistry; docs/vendors.md shows how. A
folder of this repository, ``dispatch/backends/vendor/NAME``, may have the modules ``register_platform`` and ``patch``, which are
imported for the vendor that was detected or chosen. With ``SGLANG_FL_PATCHES=0`` none of either is loaded.
"""

import importlib
import importlib.util
import logging
import os
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..utils.packages import last_line, nearest, origin_of

logger = logging.getLogger("sglang_fl")

GROUP = "sglang.srt.plugins"
_FOLDERS = "sglang_fl.dispatch.backends.vendor"
_MODULES = ("register_platform", "patch")


def foreign_plugins() -> list[EntryPoint]:
    """The plugins that are neither ours nor of a package that SGLang itself asks for."""
    try:
        required = {canonicalize_name(Requirement(line).name) for line in requires("sglang") or ()}
    except PackageNotFoundError:
        required = set()
    entries = (entry for entry in entry_points(group=GROUP) if entry.name != "sglang_fl")
    return [entry for entry in entries if entry.dist is None or canonicalize_name(entry.dist.name) not in required]


def leave_out_packages() -> None:
    """Before SGLang loads its plugins, with SGLang's own switch, which worker processes inherit: all but :func:`foreign_plugins`."""
    foreign = foreign_plugins()
    os.environ["SGLANG_PLUGINS"] = ",".join(sorted({entry.name for entry in entry_points(group=GROUP) if entry not in foreign}))


def packages_with_changes() -> list[str]:
    """The packages that may change SGLang, each with its entry point."""
    return sorted(origin_of(entry) for entry in foreign_plugins())


class _Failures(logging.Handler):
    """What SGLang's loggers report as failed: the plugin or the changed function, and why."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        why = f"{last_line(error)}{nearest(error)}" if error is not None else record.getMessage()
        name = record.args[0] if isinstance(record.args, tuple) and record.args else record.getMessage()
        self.found.append((str(name), why))


def load_changes() -> list[str]:
    """Make the changes of packages in this process, as a server does; what failed, and whose it is.

    SGLang only logs what fails, and does it once in a process: what had failed before is not found.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    failures, logger_of_sglang = _Failures(), logging.getLogger("sglang.srt.plugins")
    logger_of_sglang.addHandler(failures)
    try:
        load_plugins()
    finally:
        logger_of_sglang.removeHandler(failures)
    origins = {entry.name: origin_of(entry) for entry in foreign_plugins()}
    problems = []
    for name, why in failures.found:
        if name in origins:
            problems.append(f"{origins[name]} changes nothing in SGLang: {why}")
        else:
            hooks = HookRegistry._hooks.get(name, ())
            whose = ", ".join(sorted({origins.get(source.plugin_name, source.plugin_name) for *_, source in hooks if source is not None}))
            problems.append(f"{whose or 'a package'} cannot change {name}: {why}")
    return problems


def load_vendor_folder(vendor: str) -> None:
    """Import what our folder of a vendor has to change in SGLang. Errors are SGLang's to log: it says which plugin failed."""
    if importlib.util.find_spec(f"{_FOLDERS}.{vendor}") is None:
        return
    for module in _MODULES:
        name = f"{_FOLDERS}.{vendor}.{module}"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


def changes_made() -> list[str]:
    """Each function of SGLang that HookRegistry holds a change of, and whose it is. Our own are left out."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    found = []
    patched = getattr(HookRegistry, "_patched", ())
    for target, hooks in getattr(HookRegistry, "_hooks", {}).items():
        for kind, function, source in hooks:
            module = getattr(function, "__module__", "?")
            ours = module.startswith("sglang_fl.") and not module.startswith(_FOLDERS)
            if not ours:
                package = module if source is None or module.startswith(_FOLDERS) else source.dist_name or source.plugin_name
                state = "" if target in patched else ", which failed: SGLang's log says why"
                found.append(f"{target}: {kind.value}, by {package} ({module}.{getattr(function, '__qualname__', function)}){state}")
    return sorted(found)


def log_changes(allowed: bool) -> None:
    """One line for each change, where a server starts."""
    if not allowed:
        logger.warning("SGLANG_FL_PATCHES=0: not loaded: %s", ", ".join(packages_with_changes()) or "no package changes SGLang")
    for change in changes_made():
        logger.info("SGLang is changed: %s", change)
