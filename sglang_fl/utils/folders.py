# SPDX-License-Identifier: Apache-2.0
"""The folders of this package in the user's home directory."""

from pathlib import Path
from typing import Literal

import platformdirs


class NoHomeDirectory(Exception):
    """There is no place for a user's file, as in a container that runs under any user's number. The message says what to set."""


def user_folder(kind: Literal["cache", "data", "state"], purpose: str, instead: str = "") -> Path:
    """A folder, which may not be there yet.

    Args:
        purpose: what lies there, for the message.
        instead: a setting that names another place.

    Raises:
        NoHomeDirectory
    """
    path = {"cache": platformdirs.user_cache_path, "data": platformdirs.user_data_path, "state": platformdirs.user_state_path}[kind]
    try:
        return path("sglang-fl").expanduser()
    except RuntimeError:
        ways = " or ".join(filter(None, ("HOME", f"XDG_{kind.upper()}_HOME", instead)))
        raise NoHomeDirectory(f"no place for {purpose}: this user has no home directory. Set {ways}") from None
