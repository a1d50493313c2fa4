# SPDX-License-Identifier: Apache-2.0
"""SGLang's HookRegistry, which logs what goes wrong with a hook, and goes on."""

import pkgutil
from collections.abc import Callable
from typing import Any


def hook(target: str, function: Callable[..., Any], when: str = "around") -> bool:
    """Have SGLang put a function around another one, or after it. Imports the target.

    Args:
        target: as ``package.module.name`` or ``package.module.Class.method``.
        when: a value of SGLang's HookType.

    Returns:
        Whether it stands there now. If not, another plugin has hooked it already, or SGLang's log says why.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    before = pkgutil.resolve_name(target)
    HookRegistry.register(target, function, HookType(when), source=HookSource("sglang_fl", "sglang-fl"))
    HookRegistry.apply_hooks()
    return pkgutil.resolve_name(target) is not before
