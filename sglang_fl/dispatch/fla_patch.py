# SPDX-License-Identifier: Apache-2.0
"""The name under which backends of FlagOS reach SGLang's own functions of hybrid models."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..utils.suggest import suggest
from .bridge.catalog import FUNCTIONS

_MODULES = {name: module for module, name in FUNCTIONS.values()}
_MODULES["fused_recurrent_gated_delta_rule"] = "sglang.kernels.ops.attention.fla.fused_recurrent"


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
    original: Callable[..., Any] = inspect.unwrap(getattr(import_module(_MODULES[name]), name))
    return original
