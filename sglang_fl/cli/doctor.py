# SPDX-License-Identifier: Apache-2.0
"""Show the platform, versions and each layer's state, and what is wrong and what to do about it."""

import argparse
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..config import Settings, SettingsError
from ..device import Device, detect, probe
from ..device.declared import known_vendors, platforms_told
from ..dispatch.backends.flaggems.library import TESTED, changed_signatures, why_not_here
from ..dispatch.bridge.catalog import classes_of
from ..dispatch.manager import OpManager
from ..dispatch.ops import OPERATORS
from ..dispatch.policy import SelectionPolicy
from ..distributed.device_communicators.flagcx_files import FlagCXError, find_library, header_of
from ..startup import check_settings
from ..startup.words import flaggems_functions
from .ops import OpRow, operator_rows

_PACKAGES = ("sglang", "torch", "triton", "sglang-kernel", "flag_gems", "torch_npu", "transformers")
_PLATFORM_GROUP = "sglang.srt.platforms"


@dataclass(frozen=True)
class Problem:
    """Something wrong, and what to do about it. A fatal one stops a server."""

    what: str
    remedy: str
    fatal: bool = False


@dataclass
class Diagnosis:
    """What the doctor found."""

    device: dict[str, str | None]
    versions: dict[str, str | None]
    layers: list[dict[str, str]] = field(default_factory=list)
    aten: dict[str, Any] | None = None
    backends: list[str] = field(default_factory=list)
    platforms: list[str] = field(default_factory=platforms_told)
    problems: list[Problem] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deep",
        action="store_true",
        help="import SGLang too: ask PyTorch for the device, check what sglang-fl stands on, replace the ATen operators and list them",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    found = diagnose(os.environ, deep=args.deep)
    if args.json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        _print(found)
    return 1 if any(problem.fatal for problem in found.problems) else 0


def diagnose(environ: Mapping[str, str], *, deep: bool = False) -> Diagnosis:
    """Look at everything. ``deep`` imports PyTorch and SGLang, which takes most of a minute, and FlagGems if it is in use."""
    device = detect() if deep else probe(environ)
    vendor = known_vendors()[device.vendor]
    found = Diagnosis(
        device={
            "vendor": device.vendor,
            "chip": vendor.chip,
            "device type": device.device_type,
            "platform": f"SGLang's own ({device.in_tree})" if device.in_tree else "out of tree",
            "collectives": vendor.collective,
            "attention": vendor.attention or "SGLang's choice",
            "known by": device.evidence,
        },
        versions={"sglang-fl": __version__, **{name: _version(name) for name in _PACKAGES}},
    )
    found.problems += _package_problems(device)
    found.problems += _plugin_problems(environ)
    manager = OpManager()
    try:
        settings = check_settings(environ, device, manager)
    except SettingsError as error:
        found.problems += [Problem(told, "correct it; a server does not start with it", fatal=True) for told in error.problems]
    else:
        operators = operator_rows(manager, settings)
        found.layers = [_first_layer(settings, device), *map(_second_layer, operators), _collectives(settings, device, environ)]
        found.problems += _order_problems(operators, settings)
        found.problems += _flaggems_problems(device, settings)
        found.problems += _flagcx_problems(settings, environ, deep=deep)
        if deep:
            found.aten = _aten_operators(settings, device, found.problems)
    if manager.discovery is not None:
        found.backends = list(manager.discovery.loaded)
        found.problems += [
            Problem(f"backend {failure.origin} is not in use: {failure.reason}", "mend or uninstall that package")
            for failure in manager.discovery.failed
            if failure.module is None
        ]
        found.problems += [Problem(told, "mend that package") for told in manager.discovery.misspelt]
    if deep:
        found.problems += _sglang_problems()
        found.problems += _declaration_problems(device)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package_problems(device: Device) -> list[Problem]:
    problems = []
    installed = _version("sglang")
    if installed is None:
        problems.append(
            Problem("SGLang is not installed", "install sglang-fl again, with what it depends on (uv pip install .)", fatal=True)
        )
    else:
        for line in _requirements():
            if line.name == "sglang" and not line.specifier.contains(installed, prereleases=True):
                problems.append(
                    Problem(
                        f"SGLang {installed} is installed; sglang-fl {__version__} was tested with {line.specifier}",
                        f"pip install 'sglang{line.specifier}'",
                    )
                )
    return problems


def _flaggems_problems(device: Device, settings: Settings) -> list[Problem]:
    """What is wrong with FlagGems, where the settings have a use for it."""
    policy = SelectionPolicy.from_settings(settings)
    on_it = [op for op in OPERATORS if "flagos" in policy.order_for(op)]
    replaces_aten = settings.flagos_whitelist != ()
    if not (known_vendors()[device.vendor].flaggems and settings.use_flaggems and (replaces_aten or on_it)):
        return []
    if importlib.util.find_spec("flag_gems") is None:
        install = "uv pip install '.[flaggems]' in sglang-fl's checkout, or uv pip install flag_gems"
        use = f"serves {device.vendor}" if replaces_aten else f"would run {', '.join(on_it)}"
        return [Problem(f"FlagGems is not installed, and {use}", install)]
    return [Problem(told, f"pip install flag_gems=={TESTED}, which sglang-fl was tested with") for told in changed_signatures()]


def _requirements() -> list[Requirement]:
    """What this package's metadata asks for, with its extras."""
    try:
        return [Requirement(line) for line in requires("sglang-fl") or ()]
    except PackageNotFoundError:
        return []


def _plugin_problems(environ: Mapping[str, str]) -> list[Problem]:
    problems = []
    names = {entry.name for entry in entry_points(group=_PLATFORM_GROUP)}
    others = sorted(names - {"sglang_fl"})
    chosen = environ.get("SGLANG_PLATFORM", "")
    if "sglang_fl" not in names:
        problems.append(
            Problem(
                "SGLang cannot find sglang-fl: its entry points are not installed",
                "uv pip install . in sglang-fl's checkout",
                fatal=True,
            )
        )
    if chosen and chosen not in names:
        installed = ", ".join(sorted(names)) or "none"
        told = f"SGLANG_PLATFORM={chosen}: there is no such platform plugin, so SGLang stops (installed: {installed})"
        problems.append(Problem(told, "set SGLANG_PLATFORM=sglang_fl, or unset it", fatal=True))
    elif chosen and chosen != "sglang_fl":
        problems.append(Problem(f"SGLANG_PLATFORM={chosen}: SGLang will not use sglang-fl", "set SGLANG_PLATFORM=sglang_fl, or unset it"))
    elif others and not chosen:
        told = f"other platform plugins are installed ({', '.join(others)}); if one of them activates too, SGLang stops"
        problems.append(Problem(told, "set SGLANG_PLATFORM=sglang_fl"))
    allowed = [name.strip() for name in environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and "sglang_fl" not in allowed and chosen != "sglang_fl":
        problems.append(Problem(f"SGLANG_PLUGINS={','.join(allowed)}: SGLang will not load sglang-fl", "add sglang_fl to it, or unset it"))
    return problems


def _sglang_problems() -> list[Problem]:
    from ..compat import IncompatibleSGLang, check_groups, check_layers, check_platform

    problems = []
    for check in (check_platform, check_groups, check_layers):
        try:
            check()
        except IncompatibleSGLang as error:
            problems.append(Problem(str(error), "install a supported SGLang", fatal=True))
    return problems


def _declaration_problems(device: Device) -> list[Problem]:
    import sglang  # noqa: F401  (before our platform, which is imported in the middle of it)

    from ..platform import platform_class
    from ..platform.declared import DeclaredMoments

    platform = platform_class(device)
    told = platform.declaration_problems() if issubclass(platform, DeclaredMoments) else []
    return [Problem(problem, "mend that package, or uninstall it", fatal=True) for problem in told]


def _second_layer(row: OpRow) -> dict[str, str]:
    return {"layer": f"2 {row.op}", "state": row.told(), "why": f"{row.order} ({row.order_from})"}


def _order_problems(rows: Sequence[OpRow], settings: Settings) -> list[Problem]:
    """Orders that name nothing which can run here."""
    then = "a server stops whose model has one, as strict is set" if settings.strict else "those stay with SGLang"
    return [
        Problem(
            f"{row.op}: nothing in its order, {row.order} ({row.order_from}), can run here for "
            f"{', '.join(name for name in classes_of(row.op) if name not in row.left)}; {then}",
            f"see 'sglang-fl ops' for what can; end the order with reference, or with sglang to leave {row.op} there",
            fatal=settings.strict,
        )
        for row in rows
        if row.cannot_run
    ]


def _collectives(settings: Settings, device: Device, environ: Mapping[str, str]) -> dict[str, str]:
    native = known_vendors()[device.vendor].collective
    state, why = f"{settings.dist_backend or native}, through SGLang", str(settings.source("dist_backend"))
    if settings.collective == "flagcx":
        library = find_library(settings.flagcx_path, environ)
        header = header_of(library)
        release = header.version if header is not None and header.version else "of unknown release"
        otherwise = "the server stops" if settings.strict else f"all take {native}"
        state = f"flagcx {release} ({library}); if the ranks do not agree, {otherwise}"
        if settings.dist_backend is None:
            why = str(settings.source("flagcx_path"))
    return {"layer": "3 collectives", "state": state, "why": why}


def _flagcx_problems(settings: Settings, environ: Mapping[str, str], *, deep: bool) -> list[Problem]:
    """What is wrong with FlagCX, where it is chosen; ``deep`` loads it."""
    if settings.collective != "flagcx":
        return []
    library = find_library(settings.flagcx_path, environ)
    header = header_of(library)
    told = None
    if header is not None and header.problems:
        told = f"{header.path} is not as sglang-fl knows FlagCX: {'; '.join(header.problems)}"
    elif deep:
        from ..distributed.device_communicators.flagcx import FlagCXLibrary

        try:
            FlagCXLibrary(library)
        except FlagCXError as error:
            told = str(error)
    remedy = "use FlagCX 0.5 to 0.13, built for this machine, on every node; or unset FLAGCX_PATH and SGLANG_FL_DIST_BACKEND"
    return [Problem(told, remedy, fatal=settings.strict)] if told else []


def _first_layer(settings: Settings, device: Device) -> dict[str, str]:
    known = flaggems_functions() or frozenset()
    if not settings.use_flaggems:
        state, why = "off", str(settings.source("use_flaggems"))
    elif (unavailable := why_not_here(device)) is not None:
        state, why = "off", unavailable
    elif settings.flagos_whitelist is not None:
        count = len(settings.flagos_whitelist)
        state, why = f"{count} of {len(known)} functions" if count else "off", f"flagos_whitelist ({settings.source('flagos_whitelist')})"
    elif settings.flagos_blacklist:
        left = len(known) - len(settings.flagos_blacklist)
        state, why = f"{left} of {len(known)} functions", f"flagos_blacklist ({settings.source('flagos_blacklist')})"
    else:
        state, why = f"all of {len(known)} functions", str(settings.source("flagos_whitelist"))
    return {"layer": "1 ATen operators", "state": state, "why": why}


def _aten_operators(settings: Settings, device: Device, problems: list[Problem]) -> dict[str, Any]:
    """Replace the operators as a server does, in this process, and say what came of it."""
    from ..aten import AtenOperators, AtenReport, why_off

    off = why_off(settings, device)
    try:
        with AtenOperators(settings) if off is None else nullcontext(AtenReport(off=off)) as report:
            pass
    except Exception as error:
        told = f"FlagGems cannot be switched on: {type(error).__name__}: {error}"
        problems.append(Problem(told, "mend its installation, or set USE_FLAGGEMS=0", fatal=settings.strict))
        report = AtenReport(off=told)
    return {
        "off": report.off,
        "replaced": dict(report.replaced),
        "left": {key: why for key, _, why in report.left},
        "left_by_reason": report.left_by_reason(),
    }


def _print(found: Diagnosis) -> None:
    console = Console(markup=False, emoji=False)
    facts = Table(title="Platform and versions", title_justify="left", show_header=False)
    for name, value in {**found.device, **found.versions}.items():
        facts.add_row(name, value or "not installed")
    console.print(facts)
    layers = Table(title="Layers", title_justify="left")
    for column in ("layer", "state", "why"):
        layers.add_column(column, overflow="fold")
    for row in found.layers:
        layers.add_row(row["layer"], row["state"], row["why"])
    if found.layers:
        console.print(layers)
    if found.aten is not None:
        _print_aten(console, found.aten)
    console.print(f"Backends: {', '.join(found.backends) or 'none'}", soft_wrap=True)
    if found.platforms:
        console.print(f"Chips of installed packages: {'; '.join(found.platforms)}", soft_wrap=True)
    if not found.problems:
        console.print("No problems found.")
    for problem in found.problems:
        console.print(f"{'ERROR' if problem.fatal else 'warning'}: {problem.what}", markup=False, soft_wrap=True)
        console.print(f"  → {problem.remedy}", markup=False, soft_wrap=True)


def _print_aten(console: Console, aten: dict[str, Any]) -> None:
    if aten["off"] is not None:
        console.print(f"ATen operators: none is replaced: {aten['off']}", soft_wrap=True)
        return
    table = Table(title="ATen operators", title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    table.add_row(f"replaced by FlagGems ({len(aten['replaced'])})", ", ".join(aten["replaced"]))
    for why, functions in aten["left_by_reason"].items():
        table.add_row(f"left to PyTorch: {why} ({len(functions)} functions)", ", ".join(functions))
    console.print(table)
