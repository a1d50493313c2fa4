# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..exact import gated_delta_rule as exact
from .call import Call, Draw, Layer, Operator
from .models import sizes
from .sequences import Sequences

#: Keys of 32 numbers of this size have a squared norm near 1e-6, the epsilon that is added to it.
_NEAR_EPSILON = 2.0**-12


@dataclass(frozen=True)
class Delta(Sequences):
    """The common part of the operators' calls.

    Attributes:
        layout: ``packed``: q, k and v are parts of one projection.
        no_norm: q and k are not normalised.
        size: the size of the numbers of q and k.
        states: the dtype of states.
    """

    heads: int = 2
    value_heads: int = 4
    key_dim: int = 32
    value_dim: int = 32
    no_norm: bool = False
    size: float = 1.0
    states: str = "float32"

    def _projection(self, draw: Draw, *rows: int) -> list[torch.Tensor]:
        """q, k and v, side by side."""
        widths = [self.heads * self.key_dim, self.heads * self.key_dim, self.value_heads * self.value_dim]
        if self.layout == "packed":
            *parts, draw.guarded["what is behind the values"] = draw.normal(*rows, sum(widths) + 24).split([*widths, 24], -1)
        else:
            parts = [draw.normal(*rows, width) for width in widths]
        for part in parts[:2]:
            part.mul_(self.size)
        if self.no_norm:
            parts[1].mul_(self.key_dim**-0.5)
        if self.values == "zeros":
            parts = [part.zero_() for part in parts]
        return parts

    def _heads(self, draw: Draw, *rows: int) -> list[torch.Tensor]:
        """q, k and v with their heads."""
        shapes = [(self.heads, self.key_dim)] * 2 + [(self.value_heads, self.value_dim)]
        return [part.unflatten(-1, shape) for part, shape in zip(self._projection(draw, *rows), shapes, strict=True)]

    def _pool(self, draw: Draw, slots: int) -> torch.Tensor | None:
        shape = (slots, self.value_heads, self.value_dim, self.key_dim)
        return None if self.pool == "none" else self._states(draw, *shape, dtype=getattr(torch, self.states))


@dataclass(frozen=True)
class Prefill(Delta):
    """A call over whole sequences.

    Attributes:
        rows: this many rows, each a sequence of ``tokens`` tokens. 0: one row for all.
        scale: 0: the operator's default.
        decay: the largest decay of the state.
        beta_as_q: beta has q's dtype.
        read_only: the pool is not updated.
        no_last, no_beta: options of the recurrent operator.
        recurrent: the call is of the recurrent operator.
    """

    tokens: int = 78
    rows: int = 0
    scale: float = 0.0
    decay: float = 1.0
    beta_as_q: bool = False
    read_only: bool = False
    no_last: bool = False
    no_beta: bool = False
    recurrent: bool = False

    def call(self, draw: Draw) -> Call:
        lengths = self._lengths()
        count, shape = (self.rows, (self.rows, self.tokens)) if self.rows else (len(lengths), (1, sum(lengths)))
        q, k, v = self._heads(draw, *shape)
        g, beta = (torch.rand(*shape, self.value_heads, generator=draw.rng) for _ in range(2))
        if self.values == "nan":
            # In the first token of the second sequence: a kernel may let it leak to earlier tokens of the chunk.
            v[0, lengths[0], 1, 3] = q[0, lengths[0] + 2, 0, 0] = torch.nan
        elif self.values == "unwritten":
            beta.zero_()
        inputs: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "g": draw.place(-self.decay * g, torch.float32),
            "beta": None if self.no_beta else draw.place(beta, None if self.beta_as_q else torch.float32),
            "scale": self.scale or None,
            "initial_state": self._pool(draw, count if self.recurrent else count + 3),
        }
        last: dict[str, Any] = {"cu_seqlens": None if self.rows else draw.index([0, *accumulate(lengths)], self.index)}
        last["use_qk_l2norm_in_kernel"] = not self.no_norm
        if self.recurrent:
            return Call(Layer(), {**inputs, "output_final_state": not self.no_last, **last}, takes_layer=False)
        inputs |= {"initial_state_indices": self._slots(draw, count), **last, "inplace_update": not self.read_only}
        updated = () if self.pool == "none" or self.read_only else ("initial_state",)
        return Call(Layer(), inputs, frozenset(updated), updated=updated, takes_layer=False)


@dataclass(frozen=True)
class Decode(Delta):
    """A call with one token of each of ``tokens`` sequences.

    Attributes:
        gates: the size of a and b. With ``rising`` a grows from 0 to it.
        forgetting: A_log, if it is not random.
        constants: the dtype of dt_bias.
    """

    tokens: int = 5
    gates: float = 1.0
    rising: bool = False
    forgetting: float = 0.0
    constants: str = "float32"

    def call(self, draw: Draw) -> Call:
        batch = len(self.slots) or self.tokens
        mixed = draw.laid_out(torch.cat(self._projection(draw, batch), -1), "view" if self.layout == "packed" else "")
        if self.values == "nan":
            mixed[1, 0] = mixed[2, -1] = torch.nan
        # Parts of one tensor, as from SGLang's projection.
        b, a = draw.normal(batch, 2 * self.value_heads, scale=1.0 if self.rising else self.gates).chunk(2, -1)
        if self.rising:
            a.copy_(torch.linspace(0, self.gates, a.numel()).view(a.shape))
        A_log = draw.normal(self.value_heads, dtype=torch.float32)
        inputs = {
            "mixed_qkv": mixed,
            "a": a if self.layout == "packed" else a.contiguous(),
            "b": b if self.layout == "packed" else b.contiguous(),
            "A_log": A_log.fill_(self.forgetting) if self.forgetting else A_log,
            "dt_bias": draw.normal(self.value_heads, dtype=getattr(torch, self.constants)),
            "scale": self.key_dim**-0.5,
            "initial_state": self._pool(draw, batch + 3),
            "out": draw.normal(batch, 1, self.value_heads, self.value_dim),
            "ssm_state_indices": self._slots(draw, batch),
            "use_qk_l2norm_in_kernel": not self.no_norm,
        }
        return Call(Layer(), inputs, frozenset({"initial_state", "out"}), takes_layer=False)


@dataclass(frozen=True)
class Update(Delta):
    """A call for the next tokens of ``tokens`` sequences. It also computes the gates. The pool is fp32.

    Attributes:
        lengths: the number of tokens of each sequence. Empty: one of each.
        drafts: this many drafted tokens of each sequence are verified; the pool is not updated. 0: decode.
        tree: the drafted tokens form a tree.
        gates: the size of a and b.
    """

    tokens: int = 5
    drafts: int = 0
    tree: bool = False
    gates: float = 1.0

    def call(self, draw: Draw) -> Call:
        lengths = self.lengths or (self.drafts or 1,) * self.tokens
        q, k, v = self._heads(draw, 1, sum(lengths))
        b, a = draw.normal(sum(lengths), 2 * self.value_heads, scale=self.gates).chunk(2, -1)
        inputs: dict[str, Any] = {
            "A_log": draw.normal(self.value_heads, dtype=torch.float32),
            "a": a if self.layout == "packed" else a.contiguous(),
            "dt_bias": draw.normal(self.value_heads, dtype=torch.float32),
            "softplus_beta": 1.0,
            "softplus_threshold": 20.0,
            "q": q,
            "k": k,
            "v": v,
            "b": b if self.layout == "packed" else b.contiguous(),
            "initial_state_source": self._pool(draw, len(lengths) + 3),
            "initial_state_indices": self._slots(draw, len(lengths)),
            "scale": None,
            "use_qk_l2norm_in_kernel": True,
            "cu_seqlens": draw.index([0, *accumulate(lengths)], "int32"),
        }
        written = ["initial_state_source"]
        if self.drafts:
            shape = (len(lengths) + 1, self.drafts, self.value_heads, self.value_dim, self.key_dim)
            rows = torch.randperm(len(lengths) + 1, generator=draw.rng)[: len(lengths)]
            inputs["disable_state_update"] = True
            inputs["intermediate_states_buffer"] = draw.normal(*shape, dtype=torch.float32)
            inputs["intermediate_state_indices"] = draw.index(rows, "int32")
            inputs |= {"cache_steps": self.drafts, "retrieve_parent_token": None}
            written.append("intermediate_states_buffer")
        if self.tree:
            parents = [[0, *(int(torch.randint(n, (1,), generator=draw.rng)) for n in range(1, self.drafts))] for _ in lengths]
            inputs["retrieve_parent_token"] = draw.index(parents, "int64")
        return Call(Layer(), inputs, frozenset(written), updated=tuple(written), takes_layer=False)


_MODELS = f"{{{sizes('key_heads', 'value_heads', 'key_dim', 'value_dim')}}}".replace("key_heads", "heads")
_HEADS = "heads=3 value_heads=3 | heads=1 value_heads=8 | heads=9 value_heads=9 | heads=17 value_heads=17"
_DIMS = "key_dim=64 value_dim=128 | key_dim=48 value_dim=80 | key_dim=256 value_dim=64"
_SERVED = "heads=2 value_heads=4 key_dim=128 value_dim=128"
_UNUSUAL = f"""
lengths=0,0,0 | lengths=64,65,128 | lengths=1,1,1 | tokens=67 rows=3 | {_HEADS} | {_DIMS} | index=int64
| no_norm scale=0.3 | size={_NEAR_EPSILON} | beta_as_q | layout=packed | decay=0 | sequences=70
"""
_SPECIAL = "values={nan,zeros,unwritten} | decay=10000"
_SIZES = f"tokens=5 {_MODELS} | tokens=78 heads=32 value_heads=32 | sequences=300 heads=1 value_heads=2 key_dim=16 value_dim=16"

OPERATORS = {
    "chunk_gated_delta_rule": Operator(
        Prefill(),
        f"{_SERVED} {{,layout=packed read_only}}",
        exact.chunk_gated_delta_rule,
        sizes=f"{_SIZES} | lengths=1,1,1 slots=0,5,2 pool=far heads=1 value_heads=1",
        vast=f"tokens=8192 {_SERVED}",
        unusual=f"""{_UNUSUAL} | slots=-1,2,-1 | slots=-1,-1,-1 | slots=3,3,3 read_only | pool={{ordered,view}} | pool=none
        | pool=none tokens=66 rows=2 | states=bfloat16""",
        special=_SPECIAL,
        fewer=4,
        captured=False,
    ),
    "fused_recurrent_gated_delta_rule": Operator(
        Prefill(recurrent=True),
        _SERVED,
        exact.fused_recurrent_gated_delta_rule,
        sizes=f"{_SIZES} | lengths=1,1,1 pool=far heads=1 value_heads=1",
        unusual=f"{_UNUSUAL} | lengths=5,0,66 | pool=none | no_last | no_beta",
        special=_SPECIAL,
        fewer=4,
        captured=False,
    ),
    "fused_recurrent_gated_delta_rule_packed_decode": Operator(
        Decode(),
        f"{_SERVED} {{,layout=packed padded}}",
        exact.fused_recurrent_gated_delta_rule_packed_decode,
        sizes=f"tokens=5 {_MODELS} | tokens=3 heads=32 value_heads=32 | tokens=3 slots=0,5,2 pool=far heads=1 value_heads=1",
        # Kernels have a block for each head of each sequence.
        many="tokens={4097,65537} heads=1 value_heads=1 key_dim=16 value_dim=16 | tokens=2049 heads=8 value_heads=32 key_dim=8 value_dim=8",
        unusual=f"""slots=-1,3,-1,0,-1 | slots=-1,-1 | {_HEADS} | {_DIMS} | index=int64 | layout=packed | pool=view | states=bfloat16
        | constants=bfloat16 | no_norm | size={_NEAR_EPSILON} | tokens=70 {{,padded}} | tokens=0""",
        # Gates beyond the range of exp; from where softplus is nearly its argument to where it is that though exp overflows.
        special="""values={nan,zeros} | gates=300 | gates=20 rising forgetting=-3 | gates=150 rising forgetting=-6 | forgetting=60""",
        fewer=16,
    ),
    "fused_sigmoid_gating_delta_rule_update": Operator(
        Update(),
        f"{_SERVED} {{,layout=packed padded}}",
        exact.fused_sigmoid_gating_delta_rule_update,
        sizes=f"tokens=3 {_MODELS} | tokens=3 slots=0,5,2 pool=far heads=1 value_heads=1",
        many="tokens=4097 heads=1 value_heads=1 key_dim=8 value_dim=8 | tokens=2049 heads=8 value_heads=32 key_dim=8 value_dim=8",
        unusual=f"""tokens=0 | slots=-1,3,-1,0,-1 | lengths=1,0,2 | {_HEADS} | {_DIMS} | index=int64 | size={_NEAR_EPSILON}
        | drafts=4 {{,layout=packed}} | drafts=6 tree | tokens=1 drafts=1""",
        special="values=zeros | gates=20 | gates=300",
        fewer=16,
        compiled=False,
    ),
}
