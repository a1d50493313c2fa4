# SPDX-License-Identifier: Apache-2.0
"""``get_original``: FlagOS's backends get SGLang's own functions of hybrid models from this module."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..utils.suggest import suggest

_OPS = "sglang.kernels.ops"
_MODULES = {
    "chunk_gated_delta_rule": f"{_OPS}.attention.fla.chunk",
    "fused_recurrent_gated_delta_rule": f"{_OPS}.attention.fla.fused_recurrent",
    "fused_recurrent_gated_delta_rule_packed_decode": f"{_OPS}.attention.fla.fused_recurrent",
    "fused_sigmoid_gating_delta_rule_update": f"{_OPS}.attention.linear.fused_sigmoid_gating_recurrent",
    "causal_conv1d_fn": f"{_OPS}.mamba.causal_conv1d_triton",
    "causal_conv1d_update": f"{_OPS}.mamba.causal_conv1d_triton",
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
    original: Callable[..., Any] = inspect.unwrap(getattr(import_module(_MODULES[name]), name))
    return original
