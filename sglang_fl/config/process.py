# SPDX-License-Identifier: Apache-2.0
"""The settings of this process, and how worker processes get them.

A server's main process puts what it resolved into the environment that its workers inherit, so that a file
edited while the server starts cannot give its ranks different settings.
"""

import json
import os
from collections.abc import Mapping, MutableMapping

from .loader import load_settings
from .options import VARIABLES
from .settings import Settings

#: The variable that carries the settings to worker processes.
RESOLVED = "_SGLANG_FL_RESOLVED_SETTINGS"


def settings_in_force() -> Settings:
    """The settings that the server which started this process resolved; otherwise those of the environment."""
    return settings_of_parent() or load_settings()


def settings_of_parent(environ: Mapping[str, str] | None = None) -> Settings | None:
    """The settings that the server's main process resolved, in a process that it started."""
    environ = os.environ if environ is None else environ
    if RESOLVED not in environ:
        return None
    handed = json.loads(environ[RESOLVED])
    # A process that was started later, with other variables, is no worker of that server.
    return Settings.from_json(handed["settings"]) if handed["variables"] == _variables(environ) else None


def hand_down(settings: Settings, environ: MutableMapping[str, str]) -> None:
    """Put settings into the environment that worker processes inherit."""
    environ[RESOLVED] = json.dumps({"settings": settings.to_json(), "variables": _variables(environ)})


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in sorted(VARIABLES | {"GEMS_VENDOR"}) if name in environ}
