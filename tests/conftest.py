# SPDX-License-Identifier: Apache-2.0
import os

import pytest

_PREFIXES = ("SGLANG_FL_", "SGLANG_FLAGGEMS_")
_NAMES = (
    "USE_FLAGGEMS",
    "FLAGCX_PATH",
    "GEMS_VENDOR",
    "SGLANG_PLATFORM",
    "SGLANG_PLUGINS",
    "SGLANG_USE_CPU_ENGINE",
    "_SGLANG_FL_RESOLVED_SETTINGS",
)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's settings are its own, whatever the shell that runs it has exported."""
    for variable in list(os.environ):
        if variable.startswith(_PREFIXES) or variable in _NAMES:
            monkeypatch.delenv(variable)
