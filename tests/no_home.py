# SPDX-License-Identifier: Apache-2.0
"""A user without a home directory, as in containers that run under any user's number."""

import pwd

import pytest


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, no folder for state, and no entry in the list of users."""

    def no_entry(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    for variable in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
