# SPDX-License-Identifier: Apache-2.0
"""What SGLang captured with the operators in force, as the log says it once all graphs of the start are there.

Before that it is not known: SGLang drops prefill graphs for some models, and a package's own graph runner may capture in another way.
"""

from typing import Any

_DRAFT = "a draft model"


class Captured:
    """The graphs so far."""

    def __init__(self) -> None:
        #: Of the model in which phase, or of which other model -> the largest size and its unit.
        self._largest: dict[str, tuple[int, str]] = {}

    def add(self, phase: str, runner: Any, shape_key: Any) -> None:
        """A graph was captured.

        Args:
            phase: ``decode`` or ``prefill``.
            runner: SGLang's; a draft model has runners of its own.
            shape_key: SGLang's; it counts a decode graph's requests and a prefill graph's tokens.
        """
        if getattr(getattr(runner, "model_runner", None), "is_draft_worker", False):
            phase = _DRAFT
        unit = "tokens" if phase == "prefill" or getattr(runner, "ragged_verify_mode", False) else "requests"
        self._largest[phase] = max(self._largest.get(phase, (0, unit)), (int(getattr(shape_key, "size", 0)), unit))

    def __bool__(self) -> bool:
        return bool(self._largest)

    def describe(self, *, has_draft: bool) -> str:
        """One line for the server's log.

        Args:
            has_draft: whether the server drafts.
        """
        if not self:
            return (
                "sglang-fl: SGLang's graph backends have captured nothing, so no FlagGems function is in force; with flagos_scope: "
                "everywhere they run outside of graphs too, but slower"
            )
        found = [self._described(phase) for phase in ("decode", "prefill")]
        if has_draft:
            found.append(_DRAFT if _DRAFT in self._largest else "no draft model")
        graphs = " and of ".join(found)
        return f"sglang-fl: FlagGems's functions run in graphs of {graphs}; all other calls run PyTorch's own ATen operators"

    def _described(self, phase: str) -> str:
        if phase not in self._largest:
            return f"no {phase}"
        size, unit = self._largest[phase]
        return f"{phase} of up to {size} {unit}"
