# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..exact import causal_conv1d as exact
from .call import Call, Draw, Form, Layer, Operator


@dataclass(frozen=True)
class Convolution(Form):
    """The common part of the operators' calls.

    Attributes:
        layout: ``packed``: x is a view of a wider projection; ``channels``: in prefill each channel is contiguous.
        pool: ``view``: other numbers lie between the slots; ``long``: slots are one token longer than needed;
            ``ordered``: no slots are given.
        padded: every third sequence has no slot.
        plain: no bias and no activation.
        index: the dtype of the slots.
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
        lengths: the lengths of the sequences. Empty: ``tokens`` split into three.
        sequences: this many sequences of one to three tokens. 0: see ``lengths``.
        fresh: all states start at zero.
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


#: For each of six tokens: its first child and its next sibling. The root has two children, which have two and one.
_CHILDREN, _SIBLINGS = (1, 3, 5, -1, -1, -1), (-1, 2, -1, 4, -1, -1)


@dataclass(frozen=True)
class Update(Convolution):
    """A call for the next tokens of ``tokens`` sequences.

    Attributes:
        drafts: the number of drafted tokens of each sequence; the state after each is kept. 0: one token, x is ``[batch, dim]``.
        tree: each sequence has six drafted tokens that form a tree.
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


#: Of Qwen3.5 and Qwen3-Next on one to eight ranks, one above a power of two, and one channel.
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
