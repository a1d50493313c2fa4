# SPDX-License-Identifier: Apache-2.0
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@cache
def overlaps() -> bool:
    """Whether this chip and this Triton can launch a kernel while the one before it ends: NVIDIA's from Hopper on, as SGLang's own are."""
    # An older Triton, as some vendors' are, has no such launch and no ``knobs`` either.
    if not hasattr(getattr(tl.extra, "cuda", None), "gdc_wait") or triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, **options: int) -> None:
    """Launch a kernel whose last parameter is OVERLAPS."""
    # torch.compile knows no such launch.
    if not torch.compiler.is_compiling() and overlaps():
        kernel[grid](*args, True, num_warps=warps, launch_pdl=True, **options)
    else:
        kernel[grid](*args, False, num_warps=warps, **options)
