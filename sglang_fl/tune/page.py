# SPDX-License-Identifier: Apache-2.0
"""The result as one self-contained HTML page."""

import math
from typing import Any

from ..utils.pages import page
from .judge import USED
from .outcome import Outcome
from .statistics import slowed

#: The axis of plots: from half to twice native's speed.
_ENDS = 0.5, 2.0


def _place(ratio: float) -> float:
    """The position of a ratio on a logarithmic axis of length 100."""
    low, high = map(math.log, _ENDS)
    at = math.log(min(max(ratio, _ENDS[0]), _ENDS[1]))
    return round(1 + 98 * (at - low) / (high - low), 2)


def _shares(outcome: Outcome) -> dict[str, list[dict[str, Any]]]:
    """case -> the parts of native's step, from left to right: the time of each backend that is used, what is saved, and the rest."""
    used = [candidate for candidate in outcome.candidates if candidate.status == USED and candidate.own_us]
    found = {}
    for case, step in outcome.step_us.items():
        backends: dict[str, float] = {}
        for one in used:
            backend = one.impl or "FlagGems's functions"
            backends[backend] = backends.get(backend, 0.0) + one.own_us.get(case, 0.0) - one.gains.get(case, 0.0)
        saved = sum(one.gains.get(case, 0.0) for one in used)
        rest = step - sum(one.own_us.get(case, 0.0) for one in used)
        parts, start = [], 0.0
        for kind, what, us in (
            *(("ours", name, us) for name, us in backends.items()),
            ("saved", "saved", saved),
            ("own", "SGLang's own", rest),
        ):
            width = max(0.0, 100 * us / step)
            parts.append({"kind": kind, "start": round(start, 2), "width": round(width, 2), "words": f"{what} {100 * us / step:.1f} %"})
            start += width
        found[case] = parts
    return found if used else {}


def as_html(outcome: Outcome) -> str:
    used = len(outcome.used.impls) + len(outcome.used.functions)
    return page(
        "tune",
        {"figure": "{:.3f}".format},
        place=_place,
        slowed=slowed,
        outcome=outcome,
        conditions=outcome.about["conditions"],
        headline=f"Replacements used: {used}" if used else "SGLang's own everywhere",
        shares=_shares(outcome),
        candidates=sorted(outcome.candidates, key=lambda one: (one.status != USED, one.impl is None, one.name)),
    )
