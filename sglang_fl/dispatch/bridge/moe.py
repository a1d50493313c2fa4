# SPDX-License-Identifier: Apache-2.0
"""What the bridges of routing and of experts both ask of SGLang."""

import sys
from types import ModuleType
from typing import Any

TOPK_MODULE = "sglang.srt.layers.moe.topk"


def sglang_topk() -> ModuleType:
    """SGLang's file of routing; it is imported wherever a layer of either bridge exists."""
    return sys.modules[TOPK_MODULE]


def server_arguments() -> Any:
    """SGLang's execution context, or None outside of a server."""
    from sglang.srt.runtime_context import get_exec

    try:
        return get_exec()
    except ValueError:
        return None


def server_reason() -> str | None:
    """Why this server's arguments or device leave routing and experts with SGLang, or None."""
    if sglang_topk()._is_hip:
        return "SGLang handles padded tokens and shared experts differently on ROCm"
    execution = server_arguments()
    if execution is not None and execution.comm.enable_symm_mem:
        return "--enable-symm-mem needs results in symmetric memory"
    return None
