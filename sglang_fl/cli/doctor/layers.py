# SPDX-License-Identifier: Apache-2.0
"""The state of each layer under the settings in force."""

from collections.abc import Mapping, Sequence

from ...config import Settings
from ...device import Device, known_vendors
from ...dispatch.backends.flaggems.library import why_not_here
from ...distributed.device_communicators.flagcx_files import find_library, header_of
from ...startup.words import flaggems_functions
from ..ops import OpRow


def layer_states(settings: Settings, device: Device, environ: Mapping[str, str], operators: Sequence[OpRow]) -> list[dict[str, str]]:
    """A row with ``layer``, ``state`` and ``why`` for Layer 1, each operator of Layer 2, and Layer 3."""
    rows = [
        ("1 ATen operators", *_aten(settings, device)),
        *((f"2 {row.op}", row.summary(), f"{row.order} ({row.order_from})") for row in operators),
        ("3 collectives", *_collectives(settings, device, environ)),
    ]
    return [dict(zip(("layer", "state", "why"), row, strict=True)) for row in rows]


def _aten(settings: Settings, device: Device) -> tuple[str, str]:
    if not settings.use_flaggems:
        return "off", str(settings.source("use_flaggems"))
    unavailable = why_not_here(device)
    if unavailable is not None:
        return "off", unavailable
    known = flaggems_functions() or frozenset()
    used = sum(settings.flagos_exclusion_reason(function) is None for function in known)
    state = "off" if not used else f"{used if used < len(known) else 'all'} of {len(known)} functions"
    lists = ("flagos_blacklist", "flagos_broken") if settings.flagos_key == "prefer" else (settings.flagos_key,)
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
