# SPDX-License-Identifier: Apache-2.0
"""Print the settings in force as YAML, each with where it came from."""

import argparse
import os
from typing import Any

import yaml

from ..config import OPTIONS
from ..device import probe
from ..dispatch.manager import get_default_manager
from ..startup import check_names

#: blacklist -> the whitelist that goes before it.
_WHITELISTS = {"oot_blacklist": "oot_whitelist", "flagos_blacklist": "flagos_whitelist"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Save the output and name the file in SGLANG_FL_CONFIG to get the same settings; what only variables can set is in comments."
    )


def run(args: argparse.Namespace) -> int:
    settings = check_names(os.environ, probe(), get_default_manager())
    print(f"# sglang-fl settings; platform {settings.platform}, profile {settings.profile_file or 'none'}")
    for name, value, source in settings.items():
        option = OPTIONS[name]
        if option.yaml and getattr(settings, _WHITELISTS.get(name, ""), None) is not None:
            # A file may have one of the two. Left out, a profile's is in force again once the whitelist is taken away.
            print(f"# {_yaml(option.yaml, value)}  # {source}")
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


def _variable(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return {None: "", True: "1", False: "0"}.get(value, value)
