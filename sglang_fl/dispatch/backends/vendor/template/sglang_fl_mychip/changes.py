# SPDX-License-Identifier: Apache-2.0
"""Changes to SGLang that no declaration can express. To use it, uncomment the entry point in ``pyproject.toml``.

SGLang calls :func:`register` in each of its processes and then installs the hooks. Hook the narrowest function, and remove the hook
when SGLang has a public interface for it. Each start logs the hooks; SGLANG_FL_PATCHES=0 starts without them.
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
