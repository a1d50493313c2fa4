# SPDX-License-Identifier: Apache-2.0
"""SGLang's kernels around the attention of hybrid models: norms, gates, and splits of fused projections."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..exact import gated_delta_rule, hybrids
from .call import Call, Draw, Form, Layer, Operator
from .models import numbers, sizes

Exactly = Callable[..., tuple[Any, ...]]


def _call(inputs: dict[str, Any], *named: str) -> Call:
    return Call(Layer(), {"grid": None, **inputs}, takes_layer=False, named=frozenset(named))


def _writes(call: Call, name: str, *, returned: bool) -> Call:
    """Let the kernel write the input ``name``. Unless ``returned``, that input is the result."""
    call.may_write, call.updated, call.returns = frozenset({name}), () if returned else (name,), returned
    return call


@dataclass(frozen=True)
class GatedNorm(Form):
    """A norm of ``[tokens * rows, hidden]``, with a gate of the same shape.

    Attributes:
        layout: the layout of x.
        rows: rows per token, one for each head.
        group: the norm is over groups of this many numbers. 0: over ``hidden``.
        activation: the activation of the gate.
        gate_first: x is gated before the norm.
        centred: a LayerNorm with a bias, not an RMSNorm.
        fused: the call is of the fused kernel.
        summed: with a residual; the sum is also a result. Only with ``fused``.
        ungated: no gate.
        scale: of x. The squares of numbers around 1e-3 are about epsilon.
    """

    hidden: int = 128
    rows: int = 1
    group: int = 0
    activation: str = "swish"
    gate_first: bool = False
    centred: bool = False
    summed: bool = False
    fused: bool = False
    ungated: bool = False
    scale: float = 3.0

    def call(self, draw: Draw) -> Call:
        shape = (self.tokens * self.rows, self.hidden)
        x, z = self.drawn(draw, *shape, scale=self.scale, largest=1e15), draw.normal(*shape, scale=2)
        weight, bias = draw.normal(self.hidden), draw.normal(self.hidden) if self.centred else None
        if self.fused:
            inputs: dict[str, Any] = {"x": x, "z": z, "weight": weight, "bias": bias, "activation": self.activation}
            named = {"residual": draw.normal(*shape, dtype=torch.float32) if self.summed else None, "eps": 1e-6, "prenorm": self.summed}
            named["residual_in_fp32"] = False
            return _writes(_call(inputs | named, *named), "x", returned=True)
        inputs = {"x": x, "weight": weight, "bias": bias, "z": None if self.ungated else z, "eps": 1e-6}
        inputs |= {"group_size": self.group or None, "norm_before_gate": not self.gate_first, "is_rms_norm": not self.centred}
        inputs["activation"] = self.activation
        return _call(inputs, *inputs)


@dataclass(frozen=True)
class HeadNorms(Form):
    """q and k as views of one projection. ``gated``: each head of q is followed by its gate. ``scale``: of all."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    gated: bool = False
    scale: float = 2.0

    def call(self, draw: Draw) -> Call:
        widths = [self.heads * self.head_dim * (1 + self.gated), self.kv_heads * self.head_dim]
        q, k, draw.guarded["the numbers after k"] = draw.normal(self.tokens, sum(widths) + 8, scale=self.scale).split([*widths, 8], -1)
        inputs = {"q": q, "k": k, "q_weight": draw.normal(self.head_dim), "k_weight": draw.normal(self.head_dim), "eps": 1e-6}
        inputs |= {"head_dim": self.head_dim} | ({"num_heads": self.heads} if self.gated else {})
        return _call(inputs)


@dataclass(frozen=True)
class OutputGate(Form):
    """The output gate of an attention layer.

    Attributes:
        packed: the gate is a view; each head's query is followed by its gate.
        inplace: the result may be written over ``attn_output``.
    """

    heads: int = 4
    head_dim: int = 64
    packed: bool = False
    inplace: bool = False

    def call(self, draw: Draw) -> Call:
        x = self.drawn(draw, self.tokens, self.heads * self.head_dim)
        gate = draw.normal(*x.shape, scale=4)
        if self.packed:
            draw.guarded["the queries"], gate = draw.normal(self.tokens, self.heads, 2 * self.head_dim, scale=4).chunk(2, -1)
        inputs = {"attn_output": x, "gate": gate}
        if not self.inplace:
            return _call(inputs)
        return _writes(_call({**inputs, "inplace": True}, "inplace"), "attn_output", returned=True)


@dataclass(frozen=True)
class ExpertGate(Form):
    """The gate of a shared expert. ``added``: the gated output is added to the output of the routed experts."""

    width: int = 256
    added: bool = False

    def call(self, draw: Draw) -> Call:
        hidden = self.drawn(draw, self.tokens, self.width)
        inputs = {"hidden_states": hidden, "gate_weight": draw.normal(self.width, scale=self.width**-0.5)}
        inputs["shared_output"] = draw.normal(self.tokens, self.width)
        if not self.added:
            return _call(inputs)
        inputs["final_hidden_states"] = draw.normal(self.tokens, self.width)
        return _writes(_call(inputs), "final_hidden_states", returned=False)


@dataclass(frozen=True)
class Projection(Form):
    """The fused projections of q, k, v and z, and of b and a. ``split``: of q, k and v only."""

    heads: int = 2
    value_heads: int = 4
    key_dim: int = 32
    value_dim: int = 32
    split: bool = False

    def call(self, draw: Draw) -> Call:
        width = 2 * self.heads * self.key_dim + self.value_heads * self.value_dim
        if self.split:
            inputs: dict[str, Any] = {"mixed_qkv": self.drawn(draw, self.tokens, width)}
            inputs |= {"num_heads_q": self.heads, "num_heads_k": self.heads, "num_heads_v": self.value_heads}
            return _call(inputs | {"head_q": self.key_dim, "head_k": self.key_dim, "head_v": self.value_dim})
        inputs = {"mixed_qkvz": self.drawn(draw, self.tokens, width + self.value_heads * self.value_dim)}
        inputs |= {"mixed_ba": self.drawn(draw, self.tokens, 2 * self.value_heads)}
        inputs |= {"num_heads_qk": self.heads, "num_heads_v": self.value_heads}
        return _call(inputs | {"head_qk": self.key_dim, "head_v": self.value_dim})


@dataclass(frozen=True)
class Gating(Form):
    """The gates of ``heads`` heads. ``size``: the size of a and b. ``layout=packed``: a and b are views of one tensor."""

    heads: int = 4
    size: float = 1.0

    def call(self, draw: Draw) -> Call:
        b, a = draw.normal(self.tokens, 2 * self.heads, scale=self.size).chunk(2, -1)
        if self.layout != "packed":
            a, b = a.contiguous(), b.contiguous()
        A_log, dt_bias = (draw.normal(self.heads, dtype=torch.float32) for _ in range(2))
        return _call({"A_log": A_log, "a": a, "b": b, "dt_bias": dt_bias})


def _operator(form: Form, forms: str, exactly: Exactly, sizes: str, many: str, unusual: str, **more: Any) -> Operator:
    return Operator(form, forms, exactly, sizes=sizes, many=many, unusual=f"tokens=0 | {unusual}", compiled=False, **more)


_ROWS = "tokens={4097,65537} hidden=8"
_SPECIAL = "tokens=6 values={nan,largest,zeros}"
_ATTENTION, _FLA = "sglang.kernels.ops.attention", "sglang.kernels.ops.attention.fla"
_PROJECTIONS = f"{_ATTENTION}.triton_gdn_fused_proj"
_ELEMENTWISE, _UTILS = "sglang.kernels.ops.elementwise.elementwise", "sglang.srt.models.utils"
_BOTH = {"mixed_qkvz": 0, "mixed_ba": 0}


def _head_norms(gated: bool) -> Operator:
    return _operator(
        HeadNorms(gated=gated),
        "heads=8 kv_heads=2 head_dim=128",
        hybrids.qk_gemma_norms,
        f"tokens=3 {{{sizes('heads', 'kv_heads', 'head_dim')}}}",
        "tokens={4097,65537} heads=1 kv_heads=1 head_dim=8",
        "heads=1 kv_heads=1 | heads=7 kv_heads=7 | head_dim=96 | heads=1 kv_heads=4 | scale=1e-3",
    )


def _expert_gate(added: bool) -> Operator:
    widths = f"tokens=3 width={{{numbers('hidden')}}}"
    return _operator(
        ExpertGate(added=added), "width=1024", hybrids.gated_expert, widths, "tokens={4097,65537} width=8", "width=1 | width=257"
    )


def _projection(exactly: Exactly, layouts: str = "", *, split: bool = False, **more: Any) -> Operator:
    return _operator(
        Projection(split=split),
        "heads=2 value_heads=4 key_dim=128 value_dim=128",
        exactly,
        f"tokens=5 {{{sizes('key_heads', 'value_heads', 'key_dim', 'value_dim')}}}".replace("key_heads", "heads"),
        "tokens={4097,65537} heads=1 value_heads=2 key_dim=4 value_dim=4",
        f"heads=1 value_heads=4 | heads=3 value_heads=3 | heads=2 value_heads=8 key_dim=16 value_dim=64 {layouts}",
        **more,
    )


OPERATORS = {
    f"{_FLA}.layernorm_gated:rms_norm_gated": _operator(
        GatedNorm(),
        "hidden=128 rows=8 {,activation=sigmoid}",
        hybrids.gated_norm,
        f"tokens=3 hidden={{{numbers('value_dim')},4096,8192}} | tokens=2 hidden=8192 group=1024 gate_first",
        f"{_ROWS} {{,gate_first}}",
        "group=32 | gate_first | gate_first group=64 activation=sigmoid | centred | hidden={1,96} | ungated | scale=1e-3"
        " | layout={view,every-other}",
        special=_SPECIAL,
    ),
    f"{_FLA}.fused_norm_gate:rms_norm_gated": _operator(
        GatedNorm(fused=True),
        "hidden=128 rows=8 {,activation=sigmoid}",
        hybrids.gated_norm,
        f"tokens=3 hidden={{{numbers('value_dim')},4096,8192}}",
        _ROWS,
        "summed | hidden=96 | hidden=1 | scale=1e-3 | centred",
        special=_SPECIAL,
    ),
    f"{_UTILS}:fused_qk_gemma_rmsnorm": _head_norms(gated=False),
    f"{_UTILS}:fused_qk_gemma_rmsnorm_with_gate": _head_norms(gated=True),
    f"{_ELEMENTWISE}:fused_sigmoid_mul": _operator(
        OutputGate(),
        "heads=8 head_dim=128 {,packed inplace}",
        hybrids.sigmoid_mul,
        f"tokens=3 {{{sizes('heads', 'head_dim')}}} packed inplace",
        "tokens={4097,65537} heads=2 head_dim=4 {,packed}",
        "heads=1 head_dim=1 | heads=1 head_dim=257 packed | packed | inplace",
    ),
    f"{_ELEMENTWISE}:fused_gate_sigmoid_mul": _expert_gate(added=False),
    f"{_ELEMENTWISE}:fused_gate_sigmoid_mul_add": _expert_gate(added=True),
    f"{_PROJECTIONS}:fused_qkvzba_split_reshape_cat": _projection(hybrids.taken_apart_by_head, tokens_in=_BOTH),
    f"{_PROJECTIONS}:fused_qkvzba_split_reshape_cat_contiguous": _projection(hybrids.taken_apart, tokens_in=_BOTH),
    f"{_PROJECTIONS}:fused_qkv_split_gdn_prefill": _projection(hybrids.split, "| layout={view,odd-view}", split=True, captured=False),
    f"{_ATTENTION}.linear.fused_gdn_gating:fused_gdn_gating": _operator(
        Gating(),
        "heads=32 layout=packed",
        gated_delta_rule.fused_gdn_gating,
        f"tokens=5 heads={{{numbers('value_heads')}}}",
        "tokens={4097,65537} heads=2",
        "heads=1 | heads=7 | size=40 | layout=packed",
        captured=False,
    ),
}
