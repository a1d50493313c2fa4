# SPDX-License-Identifier: Apache-2.0
"""The doctor's checks: each is a function that yields problems."""

import ast
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from ... import compat
from ...config import Settings, ignored_variables
from ...device import Device, declared, known_vendors
from ...dispatch.backends.flaggems.library import TESTED, changed_signatures
from ...dispatch.catalog import classes_of
from ...dispatch.kernel_implementations import is_kernel
from ...dispatch.manager import OpManager
from ...dispatch.ops import OPERATORS
from ...dispatch.policy import SelectionPolicy
from ...dispatch.types import CHECK_RAISED, LazyFunction, OpImpl
from ...distributed.device_communicators.flagcx_files import FlagCXError, find_library, header_of
from ...platform.absent_packages import stands_in_for
from ...utils.packages import installed_version, last_line, nearest
from ..ops import OpRow

INSTALL_TESTED_SGLANG = f"pip install 'sglang{compat.TESTED}'"
_PLATFORM_GROUP = "sglang.srt.platforms"


@dataclass(frozen=True)
class Problem:
    """A problem and its remedy. A fatal one stops a server."""

    what: str
    remedy: str
    fatal: bool = False


@dataclass(frozen=True)
class Machine:
    """The input of the checks. ``settings`` is None if they are invalid, see ``settings_errors``."""

    environ: Mapping[str, str]
    device: Device
    manager: OpManager
    deep: bool
    settings: Settings | None = None
    settings_errors: tuple[str, ...] = ()
    operators: Sequence[OpRow] = ()


def problems_of(machine: Machine) -> list[Problem]:
    """The problems that all checks find."""
    found = [problem for check in _CHECKS for problem in check(machine)]
    if machine.settings is not None:
        found += [problem for check in _CHECKS_OF_SETTINGS for problem in check(machine, machine.settings)]
    if machine.deep:
        declaration = list(declared_platform(machine))  # where it is wrong, SGLang's modules may not be importable
        found += declaration or sglang_interfaces(machine)
    return list({problem.what: problem for problem in found}.values())  # two checks may find the same


def sglang_release(machine: Machine) -> Iterator[Problem]:
    if installed_version("sglang") is None:
        yield Problem("SGLang is not installed", INSTALL_TESTED_SGLANG, fatal=True)
    elif warning := compat.version_warning():
        yield Problem(warning, INSTALL_TESTED_SGLANG)


def why_not_importable() -> str | None:
    """The first module that SGLang imports at its start and that is missing, with file and line, or None. Nothing is imported."""
    spec = importlib.util.find_spec("sglang")
    places = getattr(spec, "submodule_search_locations", None)
    file = Path(places[0], "srt", "utils", "common.py") if places else None
    if file is None or not file.is_file():
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in names:
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                return f"SGLang cannot be imported: {file}:{node.lineno} imports {name}, which is not installed"
    return None


def sglang_imports(machine: Machine) -> Iterator[Problem]:
    if what := why_not_importable():
        remedy = "install it in the chip vendor's build; if there is none, the vendor's package can stand in for it (docs/vendors.md)"
        yield Problem(what, remedy, fatal=True)


def platform_plugins(machine: Machine) -> Iterator[Problem]:
    names = {entry.name for entry in entry_points(group=_PLATFORM_GROUP)}
    others = ", ".join(sorted(names - {"sglang_fl"}))
    chosen = machine.environ.get("SGLANG_PLATFORM", "")
    choose_ours = "set SGLANG_PLATFORM=sglang_fl, or unset it"
    if "sglang_fl" not in names:
        what = "SGLang cannot find sglang-fl: its entry points are not installed"
        yield Problem(what, "uv pip install . in sglang-fl's checkout", fatal=True)
    if chosen and chosen not in names:
        installed = ", ".join(sorted(names)) or "none"
        what = f"SGLANG_PLATFORM={chosen}: there is no such platform plugin, so SGLang stops (installed: {installed})"
        yield Problem(what, choose_ours, fatal=True)
    elif chosen and chosen != "sglang_fl":
        yield Problem(f"SGLANG_PLATFORM={chosen}: SGLang will not use sglang-fl", choose_ours)
    elif others and not chosen:
        what = f"other platform plugins are installed ({others}); if one of them activates too, SGLang stops"
        yield Problem(what, "set SGLANG_PLATFORM=sglang_fl")
    allowed = [name.strip() for name in machine.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and "sglang_fl" not in allowed and chosen != "sglang_fl":
        yield Problem(f"SGLANG_PLUGINS={','.join(allowed)}: SGLang will not load sglang-fl", "add sglang_fl to it, or unset it")


def unusable_settings(machine: Machine) -> Iterator[Problem]:
    for message in machine.settings_errors:
        yield Problem(message, "correct it; a server does not start otherwise", fatal=True)


def meaningless_variables(machine: Machine) -> Iterator[Problem]:
    for message in ignored_variables(machine.environ):
        yield Problem(message, "unset it")


def broken_backends(machine: Machine) -> Iterator[Problem]:
    discovery = machine.manager.discovery
    if discovery is None:
        return
    for failure in discovery.failed:
        if failure.module is None:  # a module of SGLANG_FL_PLUGIN_MODULES is an error of the settings
            yield Problem(f"backend {failure.origin} is not in use: {failure.reason}", "fix or uninstall that package")
    for message in discovery.warnings:
        yield Problem(message, "fix that package")


def orders(machine: Machine, settings: Settings) -> Iterator[Problem]:
    then = "a server stops if its model has such a layer, as strict is set" if settings.strict else "those layers stay with SGLang"
    for row in machine.operators:
        if row.cannot_run:
            classes = ", ".join(name for name in classes_of(row.op) if name not in row.left)
            yield Problem(
                f"{row.op}: no implementation in its order, {row.order} ({row.order_from}), is available here for {classes}; {then}",
                f"run 'sglang-fl ops' to see which are; end the order with reference, or with sglang to leave {row.op} to SGLang",
                fatal=settings.strict,
            )


def heavy_declarations(machine: Machine) -> Iterator[Problem]:
    for origin, imported in declared().heavy.items():
        what = (
            f"the module of {origin} that declares a platform imports {imported}: SGLang imports it in the middle of its own import, "
            "and so does every command of sglang-fl"
        )
        yield Problem(what, "import it where it is used; a declaration names classes as 'module:Class'")


def raising_checks(machine: Machine, settings: Settings) -> Iterator[Problem]:
    """An implementation whose check raises is not available. Its author may not have meant that."""
    found: dict[str, list[str]] = {}
    for row in machine.operators:
        for impl in row.implementations:
            if impl["why"].startswith(CHECK_RAISED):
                found.setdefault(f"{impl['impl']}: {impl['why']}", []).append(row.op)
    for what, ops in found.items():
        yield Problem(f"{what}, for {', '.join(ops)}", "have _is_available return False where the chip or a library is not there")


def functions_of_packages(machine: Machine) -> list[OpImpl]:
    """Those in the orders in force that are imported at their first use. The functions for SGLang's kernels are looked at elsewhere."""
    found = [
        machine.manager.registry.get_implementation(row.op, i["impl"])
        for row in machine.operators
        for i in row.implementations
        if not i["why"]
    ]
    lazy = [impl for impl in found if impl is not None and isinstance(impl.fn, LazyFunction) and not is_kernel(impl.op_name)]
    return [impl for impl in lazy if not impl.module.startswith("sglang_fl.")]


def importable_functions(machine: Machine, settings: Settings) -> Iterator[Problem]:
    for impl in functions_of_packages(machine) if machine.deep else ():
        try:
            impl.function  # noqa: B018  # imports it
        except Exception as error:
            what = f"{impl.impl_id} cannot run {impl.op_name}: {last_line(error)}{nearest(error)}"
            then = "a server stops, as strict is set" if settings.strict else "the next in the order runs instead"
            yield Problem(what, f"fix or uninstall that package; {then}", fatal=settings.strict)


def flaggems(machine: Machine, settings: Settings) -> Iterator[Problem]:
    policy = SelectionPolicy.from_settings(settings)
    ordered = [op for op in OPERATORS if "flagos" in policy.order_for(op)]
    replaces_aten = settings.use_flaggems and settings.flagos_functions != ()
    vendor = machine.device.vendor
    if not (known_vendors()[vendor].flaggems and (replaces_aten or ordered)):
        return
    if importlib.util.find_spec("flag_gems") is None:
        use = f"to replace ATen operators on {vendor}" if replaces_aten else f"by the order of {', '.join(ordered)}"
        install = "uv pip install '.[flaggems]' in sglang-fl's checkout, or uv pip install flag_gems"
        yield Problem(f"FlagGems is not installed, but the settings use it {use}", install)
    for message in changed_signatures():
        yield Problem(message, f"pip install flag_gems=={TESTED}, which sglang-fl was tested with")


def flagcx(machine: Machine, settings: Settings) -> Iterator[Problem]:
    """Where FlagCX is chosen; ``deep`` loads it."""
    if settings.collective != "flagcx":
        return
    library = find_library(settings.flagcx_path, machine.environ)
    header = header_of(library)
    message = None
    if header is not None and header.problems:
        message = f"{header.path} differs from the FlagCX that sglang-fl supports: {'; '.join(header.problems)}"
    elif machine.deep:
        from ...distributed.device_communicators.flagcx import FlagCXLibrary

        try:
            FlagCXLibrary(library)
        except FlagCXError as error:
            message = str(error)
    if message:
        remedy = "use FlagCX 0.5 to 0.13, built for this machine, on every node; or unset FLAGCX_PATH and SGLANG_FL_DIST_BACKEND"
        yield Problem(message, remedy, fatal=settings.strict)


def sglang_interfaces(machine: Machine) -> Iterator[Problem]:
    settings = machine.settings or Settings()
    if problems := compat.binding_problems():
        yield Problem(compat.leave_everything_message(problems), INSTALL_TESTED_SGLANG, fatal=settings.strict)
    if problems := compat.group_problems():
        yield Problem(f"FlagCX: {compat.stop_message(problems)}", INSTALL_TESTED_SGLANG, fatal=settings.collective == "flagcx")


def declared_platform(machine: Machine) -> Iterator[Problem]:
    """Problems of the package that brings up this chip."""
    try:
        from ...platform import platform_class
        from ...platform.declared import DeclaredHooks
    except ImportError as error:  # a module that stands in for a package
        yield Problem(f"SGLang cannot be imported: {error}", "fix or uninstall that package", fatal=True)
        return

    platform = platform_class(machine.device)
    for message in platform.declaration_problems() if issubclass(platform, DeclaredHooks) else []:
        yield Problem(message, "fix or uninstall that package", fatal=True)


def unused_stand_ins(machine: Machine) -> Iterator[Problem]:
    """Where a package can be used, what the chip's package provides of it is not."""
    declaration = declared().platforms.get(machine.device.vendor)
    for package in declaration.stand_ins if declaration is not None else ():
        if not stands_in_for(package):
            origin = declared().origins[machine.device.vendor]
            what = f"{package} can be imported, so nothing stands in for it, though {origin} declares that"
            remedy = f"if that build is not for this chip, uninstall {package}, or have the package name it in hide_installed"
            yield Problem(what, remedy)


_CHECKS = (
    unused_stand_ins,
    heavy_declarations,
    sglang_release,
    sglang_imports,
    platform_plugins,
    unusable_settings,
    meaningless_variables,
    broken_backends,
)
_CHECKS_OF_SETTINGS = (orders, raising_checks, importable_functions, flaggems, flagcx)
