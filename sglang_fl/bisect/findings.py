# SPDX-License-Identifier: Apache-2.0
"""What a pass found of each call, gathered by layer and phase."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..check.exact.judge import Verdict
from ..model_run import Replacement

#: Below it, in units of the last place, native's own error says nothing.
_LEAST_ULP = 0.5
#: SGLang's own result is wrong, and not just rounded more often, beyond so many times what rounding once may cost.
WRONG = 10.0


@dataclass
class Finding:
    """The calls of one replacement in one layer, batch and phase.

    Attributes:
        path: the layer's name in the model, or the ATen operator.
        calls: how many there were.
        differ: how many gave anything else than SGLang's or PyTorch's own.
        error_ulp, native_ulp: the errors in the call in which ours is worst, in units of the last place.
        used: the share of its bound that this error takes.
        worst, mean: the error over native's own error.
        native_used: the largest share of the bound that native's own error takes.
        problem: what is wrong, in the first call where something is; and which call that is, from 0 on.
        rank: on which.
        archive: the file with the inputs of the call that is wrong, if it was written.
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
    problem: str | None = None
    call: int | None = None
    archive: str | None = None
    ratios: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.ratios) / len(self.ratios) if self.ratios else 0.0

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
        if ours.error_ulp is None:
            return
        native_ulp = native.error_ulp if native is not None else None
        ratio = ours.error_ulp / max(native_ulp or 0.0, _LEAST_ULP)
        self.ratios.append(ratio)
        if ratio > self.worst or self.error_ulp is None:
            self.worst, self.error_ulp, self.native_ulp = ratio, ours.error_ulp, native_ulp
        self.used = max(self.used, ours.used)


def suspicion(findings: Iterable[Finding]) -> dict[Replacement, float]:
    """How suspicious each replacement is: out of its bounds, more than wrong in nothing, more than always native's own result."""
    found: dict[Replacement, float] = {}
    for finding in findings:
        weight = 50.0 if finding.problem is not None else 1.0 + finding.used if finding.differ else 0.1
        found[finding.replacement] = max(found.get(finding.replacement, 0.0), weight)
    return found
