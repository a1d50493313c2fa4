# SPDX-License-Identifier: Apache-2.0
"""The report as one self-contained HTML page."""

import math
from collections.abc import Sequence
from typing import Any

from ..check.report import number
from ..check.results import grouped
from ..fingerprint import versions
from ..utils.pages import page
from .findings import Finding
from .model import Report
from .report import avoids, effects, not_judged, not_used, place, setting

_LEFT, _RIGHT, _ROW = 440.0, 840.0, 16.0
#: The longest name that fits on the left.
_LONGEST = 72


def as_html(report: Report) -> str:
    return page(
        "bisect",
        {"number": number},
        report=report,
        setting=setting(report.culprits, report.settings),
        avoids=avoids(report),
        place=place(setting(report.culprits, report.settings)),
        not_used=not_used(report),
        not_judged=not_judged(report),
        pictures=[_picture(name, found) for name, found in grouped(report.findings, lambda one: str(one.replacement)).items()],
        facts={**report.facts, **versions()},
        effects=list(effects(report)),
    )


def _picture(title: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """A row for each layer and phase, in the model's order. Both errors share a logarithmic scale. Infinity is at its right end."""
    shown = [finding for finding in findings if finding.error_ulp is not None or finding.problem is not None]
    errors = [error for finding in shown for error in (finding.error_ulp, finding.native_ulp) if error and math.isfinite(error)]
    low, high = (math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))) if errors else (-1, 1)
    low, high = min(low, -1), max(high, low + 1, 1)

    def place(error: float | None) -> float | None:
        if error is None:
            return None
        share = (math.log10(max(error, 10.0**low)) - low) / (high - low)
        return round(_LEFT + min(1.0, share) * (_RIGHT - _LEFT), 1)

    marks = [
        {
            "y": round((row + 0.7) * _ROW, 1),
            "name": f"{_end(finding.path.removeprefix('model.'), _LONGEST - len(when))}{when}",
            "native": place(finding.native_ulp),
            "ours": place(finding.error_ulp) if finding.error_ulp is not None else _RIGHT,
            "wrong": finding.problem is not None,
            "title": finding.problem or f"{number(finding.error_ulp)} ulp, SGLang's {number(finding.native_ulp)}",
        }
        for row, finding in enumerate(shown)
        for when in [f" {finding.phase} {finding.batch}"]
    ]
    ticks = [{"x": place(10.0**power), "name": f"1e{power}"} for power in range(low, high + 1)]
    height = round((len(shown) + 2) * _ROW)
    return {"title": title, "marks": marks, "ticks": ticks, "height": height, "left": _LEFT - 5, "right": _RIGHT}


def _end(name: str, most: int) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
