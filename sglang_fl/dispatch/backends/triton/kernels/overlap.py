# SPDX-License-Identifier: Apache-2.0
"""A kernel may be launched while the one before it in the stream runs to its end, where the chip can do that."""

import triton
import triton.language as tl


@triton.jit
def wait_for_the_last(OVERLAPS: tl.constexpr):
    """Before anything is read or written. The next kernel may be launched after it: its own waiting then covers both."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
