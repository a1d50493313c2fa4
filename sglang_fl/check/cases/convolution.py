# SPDX-License-Identifier: Apache-2.0
"""SGLang's kernels of the short causal convolution."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..exact import convolution as exact
from .call import Call, Draw, Form, Layer, Operator, inputs_of
from .models import MODELS

_KEYS = ("key_heads", "key_dim", "value_heads", "value_dim")
#: Channels of models' convolutions: of q, k and v of all heads.
_CHANNELS = sorted(
    {2 * m["key_heads"] * m["key_dim"] + m["value_heads"] * m["value_dim"] for m in MODELS if all(key in m for key in _KEYS)}
)


@dataclass(frozen=True)
class Convolution(Form):
    """What the calls have in common.

    Attributes:
        layout: ``far``: of the pool.
        channels, width: of the weights.
        wider: columns of a state that nobody uses.
        padded: every third sequence has no slot.
        no_bias, linear: without a bias, without silu.
    """

    channels: int = 24
    width: int = 4
    wider: int = 0
    padded: bool = False
    no_bias: bool = False
    linear: bool = False

    def _common(self, draw: Draw, count: int, guarded: dict[str, torch.Tensor]) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        """Weights, pool and slots."""
        weights: dict[str, Any] = {"weight": draw.normal(self.channels, self.width)}
        weights["bias"] = None if self.no_bias else draw.normal(self.channels)
        pool = draw.laid_out(draw.normal(count + 3, self.channels, self.width - 1 + self.wider), self.layout, guarded)
        slots = torch.randperm(count + 3, generator=draw.rng)[:count]
        if self.layout == "far" and count:
            slots[0] = count + 2
            slots[1:] = torch.arange(count - 1)
        if self.padded:
            slots[2::3] = exact.PADDING
        return weights, pool, draw.index(slots, "int32")

    @property
    def _activation(self) -> str | None:
        return None if self.linear else "silu"


@dataclass(frozen=True)
class Sequences(Convolution):
    """Over whole sequences of ``lengths``, or three of what ``tokens`` are; two tokens behind them belong to nobody."""

    lengths: tuple[int, ...] = ()
    sequences: int = 0

    def __call__(self, draw: Draw) -> Call:
        third = self.tokens // 3
        lengths = self.lengths or tuple(1 + n % 5 for n in range(self.sequences)) or (self.tokens - 2 * third, third, third)
        guarded: dict[str, torch.Tensor] = {}
        weights, pool, slots = self._common(draw, len(lengths), guarded)
        x = draw.normal(sum(lengths) + 2, self.channels).T
        continues = torch.randint(2, (len(lengths),), generator=draw.rng).bool().to(draw.device)
        named = {
            "activation": self._activation,
            "conv_states": pool,
            "has_initial_state": continues,
            "cache_indices": slots,
            "query_start_loc": draw.index([0, *accumulate(lengths)], "int32"),
            "seq_lens_cpu": list(lengths),
        }
        written = ("conv_states",)
        return Call(Layer(), {"grid": None, "x": x, **weights, **named}, frozenset(written), guarded, written, False, frozenset(named))


@dataclass(frozen=True)
class NextTokens(Convolution):
    """For the next tokens of ``tokens`` sequences.

    Attributes:
        drafts: so many each, which are to be verified; 0: one, in decode.
        tree: drafts form a tree.
        accepted: drafts that are not to be verified, after some of as many were accepted.
    """

    drafts: int = 0
    tree: bool = False
    accepted: bool = False

    def __call__(self, draw: Draw) -> Call:
        guarded: dict[str, torch.Tensor] = {}
        weights, pool, slots = self._common(draw, self.tokens, guarded)
        x = draw.normal(self.tokens, self.drafts, self.channels).transpose(1, 2) if self.drafts else draw.normal(self.tokens, self.channels)
        inputs = {"grid": None, "x": x, "conv_state": pool, **weights, "activation": self._activation}
        named: dict[str, Any] = {"conv_state_indices": slots}
        written = ["conv_state"]
        if self.accepted:
            named["num_accept_tokens"] = draw.index(torch.randint(1, self.drafts + 1, (self.tokens,), generator=draw.rng), "int32")
        elif self.drafts:
            rows = torch.randperm(self.tokens + 1, generator=draw.rng)[: self.tokens]
            named["intermediate_conv_window"] = draw.normal(self.tokens + 1, self.drafts, self.channels, self.width - 1)
            named["intermediate_state_indices"] = draw.index(rows, "int32")
            written.append("intermediate_conv_window")
        if self.tree:
            children, siblings = trees(draw, self.tokens, self.drafts)
            named |= {"retrieve_next_token": children, "retrieve_next_sibling": siblings}
            named["retrieve_parent_token"] = torch.zeros_like(children)
            written.append("retrieve_parent_token")
        return Call(Layer(), inputs | named, frozenset(written), guarded, tuple(written), False, frozenset(named))


def trees(draw: Draw, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random trees of drafts: each token's first child and next sibling, -1 for none."""
    children, siblings = (torch.full((count, size), -1, dtype=torch.int64) for _ in range(2))
    for row in range(count):
        last: dict[int, int] = {}
        for token in range(1, size):
            parent = int(torch.randint(token, (1,), generator=draw.rng))
            if parent in last:
                siblings[row, last[parent]] = token
            else:
                children[row, parent] = token
            last[parent] = token
    return children.to(draw.device), siblings.to(draw.device)


def _sequences(call: Call) -> tuple[Any, ...]:
    inputs = call.inputs
    tensors = inputs_of(call, ("x", "weight", "bias", "conv_states"))
    lists = (inputs[name].tolist() for name in ("query_start_loc", "cache_indices", "has_initial_state"))
    return exact.causal_conv1d_fn(*tensors, *lists, activation=inputs["activation"] is not None)


def _next_tokens(call: Call) -> tuple[Any, ...]:
    inputs: dict[str, Any] = call.inputs
    named: dict[str, Any] = {}
    if "intermediate_conv_window" in inputs:
        named |= {"windows": inputs["intermediate_conv_window"], "rows": inputs["intermediate_state_indices"].tolist()}
    if "num_accept_tokens" in inputs:
        named["accepted"] = inputs["num_accept_tokens"].tolist()
    if "retrieve_next_token" in inputs:
        named |= {"children": inputs["retrieve_next_token"].tolist(), "siblings": inputs["retrieve_next_sibling"].tolist()}
        named["parents"] = inputs["retrieve_parent_token"]
    tensors = inputs_of(call, ("x", "weight", "bias", "conv_state"))
    named |= {"slots": inputs["conv_state_indices"].tolist(), "activation": inputs["activation"] is not None}
    return exact.causal_conv1d_update(*tensors, **named)


_UNUSUAL = "width={2,3} | no_bias | linear | wider=2 | padded | channels=1 | channels=257"
_MODELS = f"channels={{{','.join(map(str, _CHANNELS))}}}"
_FILE = "sglang.kernels.ops.mamba.causal_conv1d_triton"

OPERATORS = {
    f"{_FILE}:causal_conv1d_fn": Operator(
        Sequences(),
        "channels=512 {,padded}",
        _sequences,
        sizes=f"tokens=9 {_MODELS} | tokens=8192 channels=16 | sequences=300 | lengths=3,2,4 layout=far",
        many="sequences=4097 channels=4 | lengths=65537,1 channels=4",
        vast="tokens=8192 channels=8192",
        unusual=f"{_UNUSUAL} | lengths=1,1,1 | lengths=2,0,5 | lengths=0,0,0 | lengths=8,9,7 | lengths=64,63,65 padded",
        special="lengths=5,4,3 width=4 no_bias",
        fewer=4,
        captured=False,
        compiled=False,
    ),
    f"{_FILE}:causal_conv1d_update": Operator(
        NextTokens(),
        "channels=512 {,padded}",
        _next_tokens,
        sizes=f"tokens=3 {_MODELS} | tokens=3 layout=far",
        many="tokens=4097 channels=4",
        vast="tokens=8192 channels=8192",
        unusual=f"{_UNUSUAL} | tokens=0 | drafts=4 | drafts=7 tree | drafts=4 padded | drafts=3 wider=2 accepted | tokens=1 drafts=1",
        special="no_bias linear",
        fewer=4,
        compiled=False,
    ),
}
