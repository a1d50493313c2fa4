# SPDX-License-Identifier: Apache-2.0
"""Print the settings in force as YAML, each with its source."""

import argparse
import os
from typing import Any

import yaml

from ..config import OPTIONS, ignored_variables
from ..config.options import PLATFORM
from ..device import probe
from ..dispatch.manager import get_default_manager
from ..startup import check_names

#: blacklist -> the whitelist that overrides it.
_WHITELISTS = {"oot_blacklist": "oot_whitelist", "flagos_blacklist": "flagos_whitelist"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Save the output to a file and set SGLANG_FL_CONFIG to it for the same settings; settings that only variables have are comments."
    )


def run(args: argparse.Namespace) -> int:
    device = probe()
    settings = check_names(os.environ, device, get_default_manager())
    for message in ignored_variables(os.environ):
        print(f"# warning: {message}")
    evidence = device.evidence if settings.platform == device.vendor else PLATFORM
    print(f"# sglang-fl settings; platform {settings.platform} ({evidence}), profile {settings.profile_file or 'none'}")
    rows = {name: (value, source) for name, value, source in settings.items()}
    if settings.flagos_key == "flagos_faster":  # which a file's ``prefer`` would override
        rows["flagos_whitelist"] = settings.flagos_functions, settings.source("flagos_faster")
    for name, (value, source) in rows.items():
        option = OPTIONS[name]
        is_overridden = name in _WHITELISTS and rows[_WHITELISTS[name]][0] is not None
        if option.users_key or is_overridden:
            # A user's file has none of a profile's own keys, and one of a whitelist and a blacklist.
            print(f"# {_yaml(name, value)}  # {source}")
        elif option.yaml:
            print(f"{_yaml(option.yaml, value)}  # {source}")
        else:
            print(f"# {option.env}={_variable(value)}  # {source}")
    return 0


def _yaml(key: str, value: Any) -> str:
    if key == "op_backends":
        value = {op: list(order) for op, order in value}
    elif isinstance(value, tuple):
        value = list(value)
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return f"{key}: {text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"


def _variable(value: bool | str | tuple[str, ...] | None) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(value) if isinstance(value, tuple) else value or ""
