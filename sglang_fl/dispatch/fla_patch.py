# SPDX-License-Identifier: Apache-2.0
"""``get_original``: FlagOS's backends get SGLang's own functions of hybrid models from this module."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..utils.suggest import suggest
from .catalog import FUNCTIONS

_MODULES = {op: module for op, (module, _) in FUNCTIONS.items()} | {
    "fused_recurrent_gated_delta_rule": FUNCTIONS["fused_recurrent_gated_delta_rule_packed_decode"][0]
}


def get_original(name: str) -> Callable[..., Any]:
    """SGLang's function, as it is without sglang-fl. Imports its module.

    Args:
        name: as ``"chunk_gated_delta_rule"``.

    Raises:
        KeyError: no operator replaces such a function.
    """
    if name not in _MODULES:
        raise KeyError(f"no operator replaces a function {name!r} of SGLang{suggest(name, list(_MODULES))}")
    # A hook of SGLang's HookRegistry wraps what it found.
    return inspect.unwrap(getattr(import_module(_MODULES[name]), name))
