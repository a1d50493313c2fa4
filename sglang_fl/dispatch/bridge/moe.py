# SPDX-License-Identifier: Apache-2.0
"""What the bridges of routing and of experts both ask of SGLang."""

import sys
from types import ModuleType

TOPK_MODULE = "sglang.srt.layers.moe.topk"


def sglang_topk() -> ModuleType:
    """SGLang's file of routing; it is imported wherever a layer of either bridge exists."""
    return sys.modules[TOPK_MODULE]


def server_reason() -> str | None:
    """Why this server's arguments or device leave routing and experts with SGLang, or None."""
    from sglang.srt.runtime_context import get_exec

    if sglang_topk()._is_hip:
        return "SGLang keeps padded tokens and shared experts another way on ROCm"
    try:
        execution = get_exec()
    except ValueError:  # outside a server there are no arguments
        return None
    if execution.comm.enable_symm_mem:
        return "--enable-symm-mem wants results in symmetric memory"
    return None
