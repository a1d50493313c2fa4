# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..exact import causal_conv1d as exact
from .call import Call, Draw, Form, Layer, Operator


@dataclass(frozen=True)
class Convolution(Form):
    """What both calls have in common.

    Attributes:
        layout: ``packed``: channels are a part of a projection; ``channels``: those of prefill lie one after another.
        pool: ``view``: numbers lie between the slots; ``long``: slots hold a token more; ``ordered``: nobody says
            which slots.
        padded: every third sequence has no slot.
        plain: without bias and activation.
        index: dtype of slots.
    """

    dim: int = 48
    width: int = 4
    pool: str = ""
    padded: bool = False
    plain: bool = False
    index: str = "int32"

    def _rows(self, draw: Draw, guarded: dict[str, torch.Tensor], *shape: int) -> torch.Tensor:
        """``[*shape, dim]``."""
        x = draw.place(draw.extreme(self.values, *shape, self.dim)) if self.values else draw.normal(*shape, self.dim)
        return draw.laid_out(x, "view", guarded) if self.layout == "packed" else x

    def _constants(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor | None, str | None]:
        weight = draw.normal(self.dim, self.width, scale=self.width**-0.5)
        return (weight, None, None) if self.plain else (weight, draw.normal(self.dim), "silu")

    def _pool(self, draw: Draw, slots: int, guarded: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = self.width if self.pool == "long" else self.width - 1
        wide = draw.normal(slots, 2 if self.pool == "view" else 1, self.dim, tokens)
        if self.pool == "view":
            guarded["the numbers between the slots"] = wide[:, 1]
        return wide[:, 0]

    def _slots(self, draw: Draw, count: int) -> torch.Tensor | None:
        if self.pool == "ordered":
            return None
        slots = torch.randperm(count + 2, generator=draw.rng)[:count]
        if self.padded:
            slots[1::3] = -1
        return draw.index(slots, self.index)


@dataclass(frozen=True)
class Prefill(Convolution):
    """A call over whole sequences.

    Attributes:
        lengths: of the sequences; empty: three of what ``tokens`` are.
        sequences: so many of them, of one to three tokens; 0: as ``lengths`` says.
        fresh: all begin at zero.
    """

    tokens: int = 78
    lengths: tuple[int, ...] = ()
    sequences: int = 0
    fresh: bool = False

    def __call__(self, draw: Draw) -> Call:
        third, fourth = self.tokens // 3, self.tokens // 4
        few = (self.tokens - third - fourth, third, fourth) if self.tokens > 3 else (self.tokens,)
        lengths = self.lengths or tuple(1 + n % 3 for n in range(self.sequences)) or few
        count, guarded = len(lengths), dict[str, torch.Tensor]()
        x = self._rows(draw, guarded, sum(lengths)).T
        weight, bias, activation = self._constants(draw)
        inputs: dict[str, Any] = {
            "x": x.contiguous() if self.layout == "channels" else x,
            "weight": weight,
            "bias": bias,
            "conv_states": self._pool(draw, count + 2, guarded),
            "query_start_loc": draw.index([0, *accumulate(lengths)], "int32"),
            "seq_lens_cpu": list(lengths),
            "cache_indices": self._slots(draw, count),
            "has_initial_state": None if self.fresh else draw.index([n % 4 != 1 for n in range(count)], "bool"),
            "activation": activation,
        }
        return Call(Layer(), inputs, frozenset({"conv_states"}), guarded, ("conv_states",), takes_layer=False)


#: A root with two children, of which the first has two and the second one: first child and next sibling of each.
_CHILDREN, _SIBLINGS = (1, 3, 5, -1, -1, -1), (-1, 2, -1, 4, -1, -1)


@dataclass(frozen=True)
class Update(Convolution):
    """A call for the next tokens of ``tokens`` sequences.

    Attributes:
        drafts: so many of each, whose states are kept, 0: one token, without that dimension.
        tree: the six drafts of a sequence form a tree.
    """

    drafts: int = 0
    tree: bool = False

    def __call__(self, draw: Draw) -> Call:
        batch, drafts = self.tokens, len(_CHILDREN) if self.tree else self.drafts
        guarded: dict[str, torch.Tensor] = {}
        x = self._rows(draw, guarded, batch, drafts).transpose(1, 2) if drafts else self._rows(draw, guarded, batch)
        weight, bias, activation = self._constants(draw)
        inputs: dict[str, Any] = {
            "x": x,
            "conv_state": self._pool(draw, batch + 2, guarded),
            "weight": weight,
            "bias": bias,
            "activation": activation,
            "conv_state_indices": self._slots(draw, batch),
        }
        updated: tuple[str, ...] = ("conv_state",)
        if drafts:
            rows = torch.randperm(batch + 1, generator=draw.rng)[:batch]
            inputs["intermediate_conv_window"] = draw.normal(batch + 1, drafts, self.dim, self.width - 1)
            inputs["intermediate_state_indices"] = draw.index(rows, self.index)
            updated = (*updated, "intermediate_conv_window")
        if self.tree:
            updated = (*updated, "retrieve_parent_token")
            inputs["retrieve_next_token"], inputs["retrieve_next_sibling"], inputs["retrieve_parent_token"] = (
                draw.index([numbers] * batch, "int64") for numbers in (_CHILDREN, _SIBLINGS, [-1] * drafts)
            )
        return Call(Layer(), inputs, frozenset(updated), guarded, updated, takes_layer=False)


#: Of Qwen3.5 and Qwen3-Next on one to eight ranks, and beyond a power of two.
_DIMS = "dim=8192 | dim=1024 | dim=513 | dim=1"
_UNUSUAL = "width=2 | width=3 | plain | index=int64 | padded | pool={ordered,view,long}"
_SPECIAL = "values={nan,zeros}"

OPERATORS = {
    "causal_conv1d_fn": Operator(
        Prefill(),
        "dim=512 {,layout=packed fresh}",
        lambda call: exact.causal_conv1d_fn(*call.inputs.values()),
        sizes=f"{_DIMS} | sequences=300 dim=16",
        unusual=f"{_UNUSUAL} | lengths=1,1,1 | lengths=3,4,2 | layout=channels",
        special=_SPECIAL,
        fewer=4,
        captured=False,
    ),
    "causal_conv1d_update": Operator(
        Update(),
        "dim=512 {,layout=packed}",
        lambda call: exact.causal_conv1d_update(*call.inputs.values()),
        sizes=_DIMS,
        many="tokens=4097 dim=16",
        unusual=f"{_UNUSUAL} | drafts=4 {{,padded}} | drafts=2 layout=packed | tree | tokens=0",
        special=_SPECIAL,
        fewer=16,
    ),
}
