# SPDX-License-Identifier: Apache-2.0
"""Collects what the doctor shows."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from ...config import Settings, SettingsError
from ...config.settings import FLAGOS_EXCLUDING
from ...device import Device, declared, describe_platforms, detect, known_vendors, probe
from ...dispatch.backends.flaggems.library import why_not_here
from ...dispatch.kernel_implementations import is_kernel
from ...dispatch.manager import OpManager
from ...distributed.device_communicators.flagcx_files import find_library, header_of
from ...fingerprint import versions
from ...platform.absent_packages import stand_in_for_absent_packages
from ...platform.changes import changes_made, load_changes, packages_with_changes
from ...startup import check_settings
from ...startup.words import flaggems_functions, used_functions
from ...trial import record_path, settled_record
from ..ops import OpRow, kernels_in_words, left_out_here, operator_rows
from .checks import Machine, Problem, functions_of_packages, problems_of, why_not_importable


@dataclass
class Diagnosis:
    """What the doctor found. ``layers`` is empty where the settings cannot be used, ``aten`` is None unless asked for.

    ``trials`` has the ``record`` of what ended earlier starts, a path, and what it holds by environment (versions and chip) and name.
    ``start`` is the command that starts a server here, and why it is that one.
    ``not_looked_at`` says what only ``deep`` checks, where there is some.
    """

    device: dict[str, str | None]
    versions: dict[str, str | None]
    layers: list[dict[str, str]] = field(default_factory=list)
    operators: Sequence[OpRow] = ()
    aten: dict[str, Any] | None = None
    backends: list[str] = field(default_factory=list)
    platforms: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    trials: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    not_looked_at: str = ""


def diagnose(environ: Mapping[str, str], *, deep: bool = False) -> Diagnosis:
    """Collect everything. ``deep`` imports PyTorch and SGLang, which takes most of a minute, and FlagGems if it is in use."""
    device = detect() if deep else probe(environ)
    stood_in = stand_in_for_absent_packages(device)
    machine = _look_at(environ, device, deep)
    found = Diagnosis(_device_facts(device, deep), versions(), platforms=describe_platforms(), problems=problems_of(machine))
    found.start = start_command(device, stood_in)
    found.changes = _changes_to_sglang(machine, found.problems)
    found.not_looked_at = "" if deep else _not_looked_at(machine)
    if machine.settings is not None:
        found.operators = machine.operators
        found.layers = _layer_states(machine.settings, device, environ, machine.operators)
        found.trials = _trials(machine.settings, found.problems)
        if deep:
            found.aten = _replaced_operators(machine.settings, device, found.problems)
    if machine.manager.discovery is not None:
        found.backends = list(machine.manager.discovery.loaded)
    return found


def _not_looked_at(machine: Machine) -> str:
    vendor = machine.device.vendor
    what = [f"the classes, names and values that {declared().origins[vendor]} declares"] if vendor in declared().platforms else []
    what += [f"the functions of {impl_id}" for impl_id in sorted({impl.impl_id for impl in functions_of_packages(machine)})]
    return f"{', '.join(what)}; --deep looks at them" if what else ""


def _look_at(environ: Mapping[str, str], device: Device, deep: bool) -> Machine:
    manager = OpManager()
    try:
        settings = check_settings(environ, device, manager)
    except SettingsError as error:
        return Machine(environ, device, manager, deep, settings_errors=tuple(error.problems))
    return Machine(
        environ, device, manager, deep, settings, operators=operator_rows(manager, settings, device, left_out_here(settings, device))
    )


def _changes_to_sglang(machine: Machine, problems: list[Problem]) -> list[str]:
    """Packages that change SGLang; looked at deeply the changes are applied in this process, and the functions listed."""
    if machine.settings is not None and not machine.settings.patches:
        return [f"{package}, not loaded (SGLANG_FL_PATCHES=0)" for package in packages_with_changes()]
    if not machine.deep or why_not_importable() or "sglang" not in sys.modules:  # the deep checks have imported it, if that can be done
        return packages_with_changes()
    problems += [Problem(what, "fix or uninstall that package; a server starts without the change") for what in load_changes()]
    return changes_made()


def start_command(device: Device, stood_in: Mapping[str, str]) -> str:
    """The command that starts a server here, and why.

    Args:
        stood_in: each package that modules stand in for, and why.
    """
    if "triton" in stood_in:
        return (
            f"sglang-fl serve (triton {stood_in['triton']}; the package of {device.vendor} stands in for it, and python -m "
            "sglang.launch_server imports triton before it asks for platforms)"
        )
    if stood_in:
        why = "; ".join(f"{package} {reason}" for package, reason in stood_in.items())
        return f"python -m sglang.launch_server ({why}: what stands in is there in time)"
    return "python -m sglang.launch_server"


def _device_facts(device: Device, deep: bool) -> dict[str, str | None]:
    vendor = known_vendors()[device.vendor]
    return {
        "vendor": device.vendor,
        "chip": vendor.chip,
        "device type": device.device_type,
        "platform": f"SGLang's own ({device.in_tree})" if device.in_tree else "out of tree",
        "collectives": vendor.collective,
        "attention": vendor.attention or "chosen by SGLang",
        "detected by": device.evidence,
        "detected from": "PyTorch, as in a server" if deep else "driver files and commands (--deep asks PyTorch)",
    }


def _layer_states(settings: Settings, device: Device, environ: Mapping[str, str], operators: Sequence[OpRow]) -> list[dict[str, str]]:
    """Rows with ``layer``, ``state``, ``why`` and ``checked``: Layer 1, each operator of Layer 2, SGLang's kernels, Layer 3."""
    kernels = [row for row in operators if is_kernel(row.op)]
    on, checked = kernels_in_words(kernels)
    rows = [
        ("1 ATen operators", *_aten(settings, device), ""),
        *((f"2 {row.op}", row.summary(), f"{row.order} ({row.order_from})", row.certificate) for row in operators if not is_kernel(row.op)),
        *([("2 SGLang's own kernels", on, "'sglang-fl ops --all' lists them", checked)] if kernels else []),
        ("3 collectives", *_collectives(settings, device, environ), ""),
    ]
    return [dict(zip(("layer", "state", "why", "checked"), row, strict=True)) for row in rows]


def _aten(settings: Settings, device: Device) -> tuple[str, str]:
    if not settings.use_flaggems:
        return "off", str(settings.source("use_flaggems"))
    unavailable = why_not_here(device)
    if unavailable is not None:
        return "off", unavailable
    known, used = flaggems_functions() or frozenset(), len(used_functions(settings, device))
    state = "off" if not used else f"{used if used < len(known) else 'all'} of {len(known)} functions"
    lists = FLAGOS_EXCLUDING if settings.flagos_key == "prefer" else (settings.flagos_key,)
    why = [f"{key} ({settings.source(key)})" for key in lists if getattr(settings, key) is not None]
    return state, ", ".join(why) or f"prefer ({settings.source('prefer')})"


def _collectives(settings: Settings, device: Device, environ: Mapping[str, str]) -> tuple[str, str]:
    native = known_vendors()[device.vendor].collective
    if settings.collective != "flagcx":
        return f"{settings.dist_backend or native}, through SGLang", str(settings.source("dist_backend"))
    library = find_library(settings.flagcx_path, environ)
    header = header_of(library)
    release = header.version if header is not None and header.version else "of unknown release"
    otherwise = "the server stops" if settings.strict else f"all use {native}"
    chosen_by = "flagcx_path" if settings.dist_backend is None else "dist_backend"
    return f"flagcx {release} ({library}); if the ranks do not agree, {otherwise}", str(settings.source(chosen_by))


def _trials(settings: Settings, problems: list[Problem]) -> dict[str, Any]:
    try:
        path = record_path(settings)
    except SettingsError as error:
        problems += [Problem(what, "a server starts without the record, and excludes nothing") for what in error.problems]
        return {}
    deaths = {
        bound_to: {name: f"{death}{'' if death.excludes else '; excluded after the next time'}" for name, death in names.items()}
        for bound_to, names in settled_record(path).items()
    }
    return {"record": str(path), "deaths": deaths}


def _replaced_operators(settings: Settings, device: Device, problems: list[Problem]) -> dict[str, Any]:
    """Replace the ATen operators as a server does, in this process, and report which."""
    from ...aten import AtenOperators, AtenReport, why_off

    off = why_off(settings, device)
    try:
        with AtenOperators(settings) if off is None else nullcontext(AtenReport(off=off)) as report:
            pass
    except Exception as error:
        message = f"FlagGems cannot be switched on: {type(error).__name__}: {error}"
        problems.append(Problem(message, "fix its installation, or set USE_FLAGGEMS=0", fatal=settings.strict))
        report = AtenReport(off=message)
    return {
        "off": report.off,
        "replaced": dict(report.replaced),
        "left": {key: why for key, _, why in report.left},
        "left_by_reason": report.left_by_reason(),
    }
