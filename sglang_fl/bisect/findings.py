# SPDX-License-Identifier: Apache-2.0
"""Results of the side-by-side pass, by layer and phase."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..check.exact.judge import Verdict
from ..model_run import Replacement

#: Native errors below this many ulp are not used as a divisor.
_LEAST_ULP = 0.5
#: SGLang's own result counts as wrong beyond this many times the bound and this many ulp. Smaller errors may be repeated rounding.
_WRONG, _ROUNDED = 10.0, 4.0
#: The suspicion of a replacement with a call out of bounds.
OUT_OF_BOUNDS = 50.0
#: That of one whose calls could not be judged: as if it rounded otherwise.
_NOT_JUDGED = 1.0


@dataclass
class Finding:
    """The calls of one replacement in one layer, batch and phase.

    Attributes:
        path: the layer's name in the model, or the ATen operator.
        calls: number of calls.
        differ: number of calls whose result differs from SGLang's or PyTorch's own.
        error_ulp, native_ulp: both errors, in ulp, in the call with our largest error.
        used: that error divided by its bound.
        worst, mean: our error divided by native's.
        native_used: native's error divided by its bound, the largest of all calls.
        native_largest: native's error in ulp, the largest of all calls.
        problem, call: what is wrong in the first wrong call, and its number, from 0.
        rank: the rank that made the calls.
        archive: the file with the inputs of the wrong call, or why it was not written. None: not asked for.
        inputs: the dtypes and shapes of these inputs.
    """

    replacement: Replacement
    path: str
    batch: str
    phase: str
    rank: int = 0
    calls: int = 0
    differ: int = 0
    error_ulp: float | None = None
    native_ulp: float | None = None
    used: float = 0.0
    worst: float = 0.0
    native_used: float = 0.0
    native_largest: float = 0.0
    problem: str | None = None
    call: int | None = None
    archive: str | None = None
    inputs: str = ""
    ratios: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.ratios) / len(self.ratios) if self.ratios else 0.0

    @property
    def native_is_wrong(self) -> bool:
        return self.native_used > _WRONG and self.native_largest > _ROUNDED

    @property
    def where(self) -> str:
        rank = f", rank {self.rank}" if self.rank else ""
        return f"{self.path}, {self.batch}, {self.phase}{rank}"

    def add(self, ours: Verdict, native: Verdict | None, differs: bool) -> None:
        if ours.problem is not None and self.problem is None:
            self.problem, self.call = ours.problem, self.calls
        self.calls += 1
        self.differ += differs
        if native is not None:
            self.native_used = max(self.native_used, native.used)
            self.native_largest = max(self.native_largest, native.error_ulp or 0.0)
        error = math.inf if ours.unbounded else ours.error_ulp
        if error is None:
            return
        native_ulp = native.error_ulp if native is not None else None
        ratio = error / max(native_ulp or 0.0, _LEAST_ULP)
        self.ratios.append(ratio)
        if ratio > self.worst or self.error_ulp is None:
            self.worst, self.error_ulp, self.native_ulp = ratio, error, native_ulp
        self.used = max(self.used, math.inf if ours.unbounded else ours.used)


def suspicion(findings: Iterable[Finding], not_judged: Iterable[Replacement] = ()) -> dict[Replacement, float]:
    """A weight for each replacement: high if out of bounds, low if it only differs, lowest if always equal to native."""
    found = dict.fromkeys(not_judged, _NOT_JUDGED)
    for finding in findings:
        weight = OUT_OF_BOUNDS if finding.problem is not None else 1.0 + finding.used if finding.differ else 0.1
        found[finding.replacement] = max(found.get(finding.replacement, 0.0), weight)
    return found


def rounding(findings: Iterable[Finding]) -> dict[Replacement, float]:
    """For each replacement that differs from native: by how many ulp two right results may differ. At least 1.

    SGLang's own kernel may round each element several times in bfloat16 where the replacement rounds once.
    """
    found: dict[Replacement, float] = {}
    for finding in findings:
        if finding.differ:
            errors = (finding.native_largest, finding.error_ulp or 0.0) if finding.problem is None else ()
            largest = max((error for error in errors if error <= _ROUNDED), default=0.0)
            found[finding.replacement] = max(found.get(finding.replacement, 1.0), largest)
    return dict(sorted(found.items()))
