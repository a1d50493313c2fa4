# SPDX-License-Identifier: Apache-2.0
"""Settings of sglang-fl. ``load_settings`` reads and checks them; the ``get_…`` functions are what
tools of FlagOS call today. It knows the vendors' names and nothing of the rest of the package."""

import os
from pathlib import Path
from typing import Any

from ..device import probe
from .errors import SettingsError, suggest
from .ignored import ignored_variables
from .loader import PROFILES, config_files, load_settings, platform_name, plugin_modules, profile_path
from .options import CONFIG_FILE, OPTIONS, PLATFORM, Option
from .process import RESOLVED, hand_down, settings_in_force, settings_of_parent
from .settings import FLAGOS_EXCLUDING, Settings, Source
from .words import Words, unreachable
from .yaml_file import read_mapping

#: FlagOS's name for the folder of the profiles.
_CONFIG_DIR = PROFILES


def get_platform_name() -> str:
    """The profile's name: what SGLANG_FL_PLATFORM says, or the vendor that was detected."""
    return platform_name(os.environ, probe())[0]


def get_config_path() -> str | None:
    """The last YAML file that SGLANG_FL_CONFIG names, which overrides others; else the platform's profile, else None."""
    if asked := config_files(os.environ):
        return str(Path(asked[-1]).expanduser())
    path = profile_path(*platform_name(os.environ, probe()))
    return str(path) if path else None


def load_platform_config(platform: str | None = None) -> dict[str, Any] | None:
    """What a platform's profile says, or None where there is no profile."""
    environ = dict(os.environ) if platform is None else {**os.environ, PLATFORM: platform}
    path = profile_path(*platform_name(environ, probe()))
    return {key: entry.value for key, entry in read_mapping(path, what=CONFIG_FILE, problems=[]).items()} if path else None


def get_per_op_order() -> dict[str, list[str]] | None:
    """The orders in force for single operators, or None."""
    return {op: list(order) for op, order in settings_in_force().op_backends} or None


def get_flagos_blacklist() -> list[str] | None:
    """The FlagGems functions that a blacklist, or a profile's list of broken or slower ones, excludes from Layer 1. None: no list."""
    settings = settings_in_force()
    lists = [names for key in FLAGOS_EXCLUDING if (names := getattr(settings, key)) is not None]
    if not lists:
        return None
    names = dict.fromkeys(name for names in lists for name in names)
    return [name for name in names if settings.flagos_exclusion_reason(name)]


def get_oot_blacklist() -> list[str] | None:
    """The SGLang classes that stay out of Layer 2, or None."""
    names = settings_in_force().oot_blacklist
    return None if names is None else list(names)


def get_effective_config() -> dict[str, Any]:
    """Every setting in force, by name."""
    return {name: value for name, value, _ in settings_in_force().items()}
