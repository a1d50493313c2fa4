# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..exact import causal_conv1d as exact
from .call import Call, Draw, Layer, Operator
from .sequences import Sequences


@dataclass(frozen=True)
class Convolution(Sequences):
    """The common part of the operators' calls.

    Attributes:
        layout: ``view``: x is a view of a wider projection; ``transposed``: in prefill each channel is contiguous.
        pool: also ``long``: slots are one token longer than needed.
        plain: no bias and no activation.
    """

    dim: int = 48
    width: int = 4
    plain: bool = False

    def _constants(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor | None, str | None]:
        weight = draw.normal(self.dim, self.width, scale=self.width**-0.5)
        return (weight, None, None) if self.plain else (weight, draw.normal(self.dim), "silu")

    def _pool(self, draw: Draw, slots: int) -> torch.Tensor:
        return self._states(draw, slots, self.dim, self.width if self.pool == "long" else self.width - 1)


@dataclass(frozen=True)
class Prefill(Convolution):
    """A call over whole sequences. ``fresh``: all states start at zero."""

    tokens: int = 78
    fresh: bool = False

    def call(self, draw: Draw) -> Call:
        lengths = tuple(filter(None, self._lengths()))
        count = len(lengths)
        x = self.drawn(draw, sum(lengths), self.dim).T
        weight, bias, activation = self._constants(draw)
        inputs: dict[str, Any] = {
            "x": x,
            "weight": weight,
            "bias": bias,
            "conv_states": self._pool(draw, count + 3),
            "query_start_loc": draw.index([0, *accumulate(lengths)], "int32"),
            "seq_lens_cpu": list(lengths),
            "cache_indices": self._slots(draw, count),
            "has_initial_state": None if self.fresh else draw.index([n % 4 != 1 for n in range(count)], "bool"),
            "activation": activation,
        }
        return Call(Layer(), inputs, frozenset({"conv_states"}), updated=("conv_states",), takes_layer=False)


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

    def call(self, draw: Draw) -> Call:
        batch, drafts = self.tokens, len(_CHILDREN) if self.tree else self.drafts
        x = self.drawn(draw, batch, drafts, self.dim).transpose(1, 2) if drafts else self.drawn(draw, batch, self.dim)
        weight, bias, activation = self._constants(draw)
        inputs: dict[str, Any] = {
            "x": x,
            "conv_state": self._pool(draw, batch + 3),
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
        return Call(Layer(), inputs, frozenset(updated), updated=updated, takes_layer=False)


#: Of Qwen3.5 and Qwen3-Next on one to eight ranks, one above a power of two, and one channel.
_DIMS = "dim=8192 | dim=1024 | dim=513 | dim=1"
_UNUSUAL = "width=2 | width=3 | plain | index=int64 | padded | pool={ordered,view,long}"
_SPECIAL = "values={nan,zeros}"

OPERATORS = {
    "causal_conv1d_fn": Operator(
        Prefill(),
        "dim=512 {,layout=view fresh}",
        exact.causal_conv1d_fn,
        sizes=f"{_DIMS} | sequences=300 dim=16 | lengths=1,1,1 slots=0,5,2 pool=far | tokens=3 layout=far",
        many="lengths=65537 dim=16",
        unusual=f"{_UNUSUAL} | lengths=1,1,1 | lengths=3,4,2 | layout=transposed",
        special=_SPECIAL,
        fewer=4,
        captured=False,
    ),
    "causal_conv1d_update": Operator(
        Update(),
        "dim=512 {,layout=view}",
        exact.causal_conv1d_update,
        sizes=f"{_DIMS} | tokens=3 slots=0,5,2 pool=far",
        # Kernels have a block for some channels of each sequence.
        many="tokens=4097 dim=16",
        unusual=f"{_UNUSUAL} | drafts=4 {{,padded}} | drafts=2 layout=view | tree | tokens=0",
        special=_SPECIAL,
        fewer=16,
    ),
}
