# SPDX-License-Identifier: Apache-2.0
"""Whether two engines say the same, greedily, and if not, whether rounding explains it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

#: Below this many common tokens the rounding of the two engines cannot be read off them.
SHORTEST_PREFIX = 8


def compare(baseline: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the greedy tokens of two engines (``worker.py``'s ``tokens``).

    Where they part, the baseline preferred its token by a margin of logprobs. Up to there both
    computed the same logprobs, each with its own rounding errors, whose size their differences show. Two
    logprobs that far off can turn a margin of twice the largest difference: that is a tie. The margin
    is a difference of fp32 numbers, so their spacing counts as well.
    """
    ours, theirs = baseline["tokens"], other["tokens"]
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} tokens against {len(theirs)}")
    parted = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    common = len(ours) if parted is None else parted
    pairs = list(zip(baseline["logprobs"][:common], other["logprobs"][:common], strict=True))
    largest = max((abs(a - b) for a, b in pairs), default=0.0)
    found: dict[str, Any] = {"length": len(ours), "identical": parted is None, "largest_logprob_difference": largest}
    if parted is None:
        return found | {"verdict": "identical"}
    own = baseline["logprobs"][parted]
    top = dict(baseline["top"][parted])
    # Not among the baseline's two most probable, the other's token is at least as far off as the second.
    known = theirs[parted] in top
    margin = own - (top[theirs[parted]] if known else min(top.values()))
    tolerance = 2 * (largest + float(np.spacing(np.float32(abs(own)))))
    found |= {"first_difference": parted, "tokens": [ours[parted], theirs[parted]], "margin": margin, "margin_is_exact": known}
    if common < SHORTEST_PREFIX:
        return found | {"tolerance": None, "verdict": f"differs ({common} common tokens are too few to measure rounding)"}
    tie = known and margin <= tolerance
    return found | {"tolerance": tolerance, "verdict": "tie within rounding" if tie else "differs"}
