# SPDX-License-Identifier: Apache-2.0
"""The common part of operators that update a state of each sequence, in a pool of slots."""

from dataclasses import dataclass

import torch

from .call import Draw, Form


@dataclass(frozen=True)
class Sequences(Form):
    """Sequences with states.

    Attributes:
        lengths: the lengths of the sequences. Empty: ``tokens`` split into three.
        sequences: this many sequences of one to three tokens. 0: see ``lengths``.
        slots: the slot of each sequence. -1: padding. Empty: random.
        pool: ``view``: other numbers lie between the slots; ``far``: the slots lie far apart; ``ordered``: no slots are given;
            ``none``: no pool.
        padded: every third sequence has no slot.
        index: the dtype of slots and lengths.
    """

    lengths: tuple[int, ...] = ()
    sequences: int = 0
    slots: tuple[int, ...] = ()
    pool: str = ""
    padded: bool = False
    index: str = "int32"

    def _lengths(self) -> tuple[int, ...]:
        third, fourth = self.tokens // 3, self.tokens // 4
        return self.lengths or tuple(1 + n % 3 for n in range(self.sequences)) or (self.tokens - third - fourth, third, fourth)

    def _states(self, draw: Draw, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A pool ``[slots, ...]``."""
        return draw.laid_out(draw.normal(*shape, dtype=dtype), {"view": "every-other", "far": "far"}.get(self.pool, ""))

    def _slots(self, draw: Draw, count: int) -> torch.Tensor | None:
        """A slot for each sequence, in a pool that has three more."""
        if self.pool in ("none", "ordered"):
            return None
        slots = torch.tensor(self.slots) if self.slots else torch.randperm(count + 3, generator=draw.rng)[:count]
        if self.padded:
            slots[1::3] = -1
        return draw.index(slots, self.index)
