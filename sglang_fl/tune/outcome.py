# SPDX-License-Identifier: Apache-2.0
"""The results of ``sglang-fl tune``."""

from dataclasses import dataclass, field
from typing import Any

from .bench import NATIVE, Choice
from .confirm import Confirmed
from .judge import Candidate
from .statistics import Speed


@dataclass
class Outcome:
    """The results so far.

    Attributes:
        noise: case -> the smallest effect that this machine can show.
        step_us: case -> native's time.
        served: case -> the speed of the final choice as a multiple of native's, in one engine.
        why_native: why nothing is used. Empty: something is used.
        incomplete: what the budget was too small for. Empty: nothing.
        left: the names of the earlier profile's entries that stay as they are.
        dropped: name -> why the earlier profile's choice for it is given up.
    """

    about: dict[str, Any] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    step_us: dict[str, float] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    not_exercised: list[str] = field(default_factory=list)
    used: Choice = NATIVE
    served: dict[str, Speed] = field(default_factory=dict)
    confirmed: Confirmed | None = None
    why_native: str = ""
    incomplete: str = ""
    left: frozenset[str] = frozenset()
    dropped: dict[str, str] = field(default_factory=dict)
