# SPDX-License-Identifier: Apache-2.0
"""The facts that both a server and the command line know, and their hash."""

import hashlib
import json
import sys
from typing import Any

from .. import __version__
from ..config import Settings
from ..device import Device
from ..utils.packages import installed_version

_PACKAGES = ("sglang", "torch", "triton", "sglang-kernel", "flag_gems", "torch_npu", "transformers")
#: Settings that change logs only.
_WRITTEN_DOWN = frozenset(
    {"dispatch_log", "dispatch_debug", "log_level", "flaggems_record", "flaggems_log_path", "flaggems_log_once"}
    | {"trial_record", "trial_limit"}
)


def versions() -> dict[str, str | None]:
    """The versions of sglang-fl and of all that it runs on. None: not installed."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"sglang-fl": __version__, "python": python, **{name: installed_version(name) for name in _PACKAGES}}


def machine_facts(settings: Settings, device: Device) -> dict[str, Any]:
    """The chip, the profile, the versions and the settings."""
    about = {"device": device.vendor, "evidence": device.evidence, "profile": settings.platform}
    return {**about, "versions": versions(), "settings": setting_facts(settings)}


def setting_facts(settings: Settings) -> dict[str, dict[str, Any]]:
    """The value and the source of each setting. Each order is an entry, such as ``op_backends.rms_norm``."""
    rows = [(name, value, source) for name, value, source in settings.items() if name != "op_backends"]
    rows += [(f"op_backends.{op}", list(order), settings.source_of_order(op)) for op, order in sorted(settings.op_backends)]
    return {name: {"value": list(value) if isinstance(value, tuple) else value, "source": str(source)} for name, value, source in rows}


def fingerprint(facts: dict[str, Any]) -> str:
    """A hash that is equal for servers that run the same.

    Sources of settings, settings of logs, and the reasons why something is left out are not part of it.
    """
    settings = {name: row["value"] for name, row in facts["settings"].items() if name not in _WRITTEN_DOWN}
    text = json.dumps({**facts, "settings": settings, "left_out": sorted(facts["left_out"])}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
