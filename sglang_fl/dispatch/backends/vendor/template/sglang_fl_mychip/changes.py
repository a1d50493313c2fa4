# SPDX-License-Identifier: Apache-2.0
"""Changes to SGLang that no declaration can express. Not in use until the entry point in ``pyproject.toml`` is no comment any more.

SGLang calls :func:`register` in each of its processes and then puts the hooks in place. Name the narrowest function that does it, and
remove the hook when SGLang has a better place: a start logs each, and SGLANG_FL_PATCHES=0 starts without any.
"""

from collections.abc import Callable
from typing import Any


def register() -> None:
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if current_platform.device.vendor == "mychip":
        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", started, HookType.AROUND)


def started(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A pattern: do something before or after SGLang's own function, or in its place."""
    return original(*args, **kwargs)
