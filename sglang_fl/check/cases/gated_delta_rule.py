# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..exact import gated_delta_rule as exact
from .call import Call, Draw, Layer, Named, Operator

#: Keys of 32 numbers of this size have a squared norm near 1e-6, which is what is added to it.
_NEAR_EPSILON = 2.0**-12


@dataclass(frozen=True)
class _Sizes:
    heads: int = 2
    value_heads: int = 4
    key_dim: int = 32
    value_dim: int = 32


def _sizes(tokens: int, hidden: int) -> _Sizes:
    """Heads of 128 numbers, as Qwen3-Next has, or of 64; fewer of them for many tokens, whose float64 takes long."""
    heads = max(2, min(hidden // 1024, 4096 // tokens))
    dim = 128 if hidden >= 1024 else 64
    return _Sizes(heads, 2 * heads, dim, dim)


@dataclass(frozen=True)
class _Sequences:
    """A call over whole sequences: sizes, options and where its tensors lie."""

    lengths: tuple[int, ...] = (5, 70, 3)
    sizes: _Sizes = _Sizes()
    #: The slot of each sequence; None: no pool.
    slots: tuple[int, ...] | None = (3, 0, 4)
    num_slots: int = 6
    given_slots: bool = True
    rows: int | None = None
    l2norm: bool = True
    #: Of q and k.
    size: float = 1.0
    update: bool = True
    scale: float | None = None
    packed: bool = False
    gaps: bool = False
    index_dtype: torch.dtype = torch.int32
    state_dtype: torch.dtype = torch.float32
    beta_as_q: bool = False
    decay: float = 1.0

    def draw(self, draw: Draw) -> tuple[dict[str, torch.Tensor | float | None], dict[str, torch.Tensor]]:
        """q, k, v, g, beta and the scale; and what lies around them."""
        s = self.sizes
        rows, tokens = (1, sum(self.lengths)) if self.rows is None else (self.rows, self.lengths[0])
        shapes = {"q": (s.heads, s.key_dim), "k": (s.heads, s.key_dim), "v": (s.value_heads, s.value_dim)}
        guarded: dict[str, torch.Tensor] = {}
        if self.packed:
            widths = [heads * dim for heads, dim in shapes.values()]
            *parts, guarded["what is behind the values"] = draw.normal(rows, tokens, sum(widths) + 24).split([*widths, 24], -1)
            inputs = {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        else:
            inputs = {name: draw.normal(rows, tokens, *shape) for name, shape in shapes.items()}
        if not self.l2norm:
            inputs["k"] = inputs["k"] / s.key_dim**0.5
        if self.size != 1.0:
            inputs |= {name: inputs[name] * self.size for name in "qk"}
        g = torch.rand(rows, tokens, s.value_heads, generator=draw.rng)
        beta = torch.rand(rows, tokens, s.value_heads, generator=draw.rng)
        return {
            **inputs,
            "g": draw.place(-self.decay * g, torch.float32),
            "beta": draw.place(beta, draw.dtype if self.beta_as_q else torch.float32),
            "scale": self.scale,
        }, guarded

    def pool(self, draw: Draw, guarded: dict[str, torch.Tensor]) -> torch.Tensor:
        s = self.sizes
        shape = (s.value_heads, s.value_dim, s.key_dim)
        if not self.gaps:
            return draw.normal(self.num_slots, *shape, dtype=self.state_dtype)
        wide = draw.normal(self.num_slots, 2, *shape, dtype=self.state_dtype)
        guarded["the numbers between the slots"] = wide[:, 1]
        return wide[:, 0]

    def ends(self, draw: Draw) -> torch.Tensor | None:
        if self.rows is not None:
            return None
        return torch.tensor([sum(self.lengths[:n]) for n in range(len(self.lengths) + 1)], dtype=self.index_dtype).to(draw.device)


def _chunk(draw: Draw, of: _Sequences) -> Call:
    inputs, guarded = of.draw(draw)
    pool = None if of.slots is None else of.pool(draw, guarded)
    slots = torch.tensor(of.slots, dtype=of.index_dtype).to(draw.device) if of.slots is not None and of.given_slots else None
    more = {
        "initial_state": pool,
        "initial_state_indices": slots,
        "cu_seqlens": of.ends(draw),
        "use_qk_l2norm_in_kernel": of.l2norm,
        "inplace_update": of.update,
    }
    updated = ("initial_state",) if of.slots is not None and of.update else ()
    return Call(Layer(), {**inputs, **more}, frozenset(updated), guarded, updated, takes_layer=False)


def _chunk_forms(tokens: int, hidden: int) -> Iterator[Named]:
    lengths = (tokens - tokens // 3 - tokens // 4, tokens // 3, tokens // 4)
    of = _Sequences(lengths, _sizes(tokens, hidden))
    form = f"{tokens} tokens, {of.sizes.value_heads} value heads"
    yield form, partial(_chunk, of=of)
    yield f"{form}, packed, no update", partial(_chunk, of=replace(of, packed=True, update=False))


def _common_unusual(of: _Sequences) -> Iterator[tuple[str, _Sequences]]:
    yield "no tokens", replace(of, lengths=(0, 0, 0))
    yield "exactly a chunk, and one more", replace(of, lengths=(64, 65, 128))
    yield "one token each", replace(of, lengths=(1, 1, 1))
    yield "rows instead of sequences", replace(of, lengths=(67,), rows=3)
    yield "as many heads of q", replace(of, sizes=_Sizes(3, 3))
    yield "eight heads of v to one of q", replace(of, sizes=_Sizes(1, 8))
    yield "heads of 64 and 128", replace(of, sizes=_Sizes(2, 4, 64, 128))
    yield "heads of 48 and 80", replace(of, sizes=_Sizes(2, 4, 48, 80))
    yield "lengths in int64", replace(of, index_dtype=torch.int64)
    yield "no norm, a scale", replace(of, l2norm=False, scale=0.3)
    yield "norms that the epsilon counts in", replace(of, size=_NEAR_EPSILON)
    yield "beta in q's dtype", replace(of, beta_as_q=True)
    yield "a packed projection", replace(of, packed=True)
    yield "nothing is forgotten", replace(of, decay=0.0)


def _chunk_unusual() -> Iterator[Named]:
    of = _Sequences()
    cases = dict(_common_unusual(of))
    cases["padding among the sequences"] = replace(of, slots=(-1, 2, -1))
    cases["padding alone"] = replace(of, slots=(-1, -1, -1))
    # As SGLang scores several items after one query.
    cases["one slot for all, only read"] = replace(of, slots=(3, 3, 3), update=False)
    cases["slots in order"] = replace(of, given_slots=False, slots=(0, 1, 2))
    cases["no pool"] = replace(of, slots=None)
    cases["no pool, rows"] = replace(of, slots=None, lengths=(66,), rows=2)
    cases["slots with gaps between"] = replace(of, gaps=True)
    cases["states in bf16"] = replace(of, state_dtype=torch.bfloat16)
    yield from ((name, partial(_chunk, of=case)) for name, case in cases.items())


def _recurrent(draw: Draw, of: _Sequences, final: bool = True, state: bool = True, beta: bool = True) -> Call:
    inputs, guarded = of.draw(draw)
    if not beta:
        inputs["beta"] = None
    count = len(of.lengths) if of.rows is None else of.rows
    more = {
        "initial_state": replace(of, num_slots=count).pool(draw, guarded) if state else None,
        "output_final_state": final,
        "cu_seqlens": of.ends(draw),
        "use_qk_l2norm_in_kernel": of.l2norm,
    }
    return Call(Layer(), {**inputs, **more}, guarded=guarded, takes_layer=False)


def _recurrent_forms(tokens: int, hidden: int) -> Iterator[Named]:
    of = _Sequences((tokens - tokens // 3, tokens // 3), _sizes(tokens, hidden))
    yield f"{tokens} tokens, {of.sizes.value_heads} value heads", partial(_recurrent, of=of)


def _recurrent_unusual() -> Iterator[Named]:
    for name, of in _common_unusual(_Sequences()):
        yield name, partial(_recurrent, of=of)
    yield "a sequence without tokens", partial(_recurrent, of=_Sequences(lengths=(5, 0, 66)))
    yield "from nothing", partial(_recurrent, of=_Sequences(), state=False)
    yield "no last states", partial(_recurrent, of=_Sequences(), final=False)
    yield "no beta", partial(_recurrent, of=_Sequences(), beta=False)


def _special(make: partial[Call]) -> Iterator[Named]:
    """Of a call over sequences."""

    def nan(draw: Draw) -> Call:
        call = make(draw, of=_Sequences())
        # In the first token of the second sequence: a kernel may let it reach the tokens before it in a chunk.
        call.inputs["v"][0, 5, 1, 3] = torch.nan
        call.inputs["q"][0, 7, 0, 0] = torch.nan
        return call

    def zeros(draw: Draw) -> Call:
        call = make(draw, of=_Sequences())
        for name in ("q", "k", "v"):
            call.inputs[name].zero_()
        return call

    yield "nan", nan
    yield "zeros", zeros
    yield "everything is forgotten at once", partial(make, of=replace(_Sequences(), decay=1e4))
    yield "nothing is ever written", lambda draw: _with(make(draw, of=_Sequences()), "beta", 0.0)


def _with(call: Call, name: str, value: float) -> Call:
    call.inputs[name].fill_(value)
    return call


def _with_gates_up_to(most: float, call: Call) -> Call:
    a = call.inputs["a"]
    a.copy_(torch.linspace(0, most, a.numel()).view(a.shape))
    return call


@dataclass(frozen=True)
class _Decode:
    """A decode call: sizes, options and where its tensors lie."""

    slots: tuple[int, ...] = (4, 0, 7, 2, 5)
    sizes: _Sizes = _Sizes()
    num_slots: int = 8
    l2norm: bool = True
    wide: bool = False
    gaps: bool = False
    index_dtype: torch.dtype = torch.int32
    state_dtype: torch.dtype = torch.float32
    constant_dtype: torch.dtype = torch.float32
    gates: float = 1.0

    def __call__(self, draw: Draw) -> Call:
        s, batch = self.sizes, len(self.slots)
        guarded: dict[str, torch.Tensor] = {}
        width = 2 * s.heads * s.key_dim + s.value_heads * s.value_dim
        if self.wide:
            mixed, guarded["what is behind a row"] = draw.normal(batch, width + 24).split([width, 24], -1)
            b, a = draw.normal(batch, 2 * s.value_heads, scale=self.gates).chunk(2, -1)
        else:
            mixed = draw.normal(batch, width)
            a, b = draw.normal(batch, s.value_heads, scale=self.gates), draw.normal(batch, s.value_heads, scale=self.gates)
        inputs = {
            "mixed_qkv": mixed,
            "a": a,
            "b": b,
            "A_log": draw.normal(s.value_heads, dtype=torch.float32),
            "dt_bias": draw.normal(s.value_heads, dtype=self.constant_dtype),
            "scale": s.key_dim**-0.5,
            "initial_state": _Sequences(num_slots=self.num_slots, sizes=s, gaps=self.gaps, state_dtype=self.state_dtype).pool(
                draw, guarded
            ),
            "out": draw.normal(batch, 1, s.value_heads, s.value_dim),
            "ssm_state_indices": torch.tensor(self.slots, dtype=self.index_dtype).to(draw.device),
            "use_qk_l2norm_in_kernel": self.l2norm,
        }
        return Call(Layer(), inputs, frozenset({"initial_state", "out"}), guarded, takes_layer=False)


def _decode_forms(tokens: int, hidden: int) -> Iterator[Named]:
    batch = round(tokens**0.75)
    heads = max(2, min(hidden // 1024, 512 // batch))
    dim = 128 if hidden >= 1024 else 64
    slots = torch.randperm(batch + 3, generator=torch.Generator().manual_seed(batch))[:batch].tolist()
    of = _Decode(tuple(slots), _Sizes(heads, 2 * heads, dim, dim), batch + 3)
    form = f"{batch} sequences, {2 * heads} value heads"
    yield form, of
    yield f"{form}, padded", replace(of, slots=(*slots[: batch - batch // 4], *[-1] * (batch // 4 + 1)), wide=True)


def _decode_unusual() -> Iterator[Named]:
    of = _Decode()
    yield "no sequences", replace(of, slots=())
    yield "padding among the sequences", replace(of, slots=(-1, 3, -1, 0, -1))
    yield "padding alone", replace(of, slots=(-1, -1))
    yield "as many heads of q", replace(of, sizes=_Sizes(3, 3))
    yield "eight heads of v to one of q", replace(of, sizes=_Sizes(1, 8))
    yield "heads of 64 and 128", replace(of, sizes=_Sizes(2, 4, 64, 128))
    yield "heads of 48 and 80", replace(of, sizes=_Sizes(2, 4, 48, 80))
    yield "slots in int64", replace(of, index_dtype=torch.int64)
    yield "rows of a wider tensor", replace(of, wide=True)
    yield "slots with gaps between", replace(of, gaps=True)
    yield "states in bf16", replace(of, state_dtype=torch.bfloat16)
    yield "the bias in bf16", replace(of, constant_dtype=torch.bfloat16)
    yield "no norm", lambda draw: _scaled(replace(of, l2norm=False)(draw), of.sizes.key_dim**-0.5)
    yield "norms that the epsilon counts in", lambda draw: _scaled(of(draw), _NEAR_EPSILON)
    yield "70 sequences", replace(of, slots=tuple(range(70)), num_slots=70)


def _scaled(call: Call, by: float) -> Call:
    call.inputs["mixed_qkv"].mul_(by)
    return call


def _decode_special() -> Iterator[Named]:
    def nan(draw: Draw) -> Call:
        call = _Decode()(draw)
        call.inputs["mixed_qkv"][1, 0] = call.inputs["mixed_qkv"][2, -1] = torch.nan
        return call

    yield "nan", nan
    yield "zeros", lambda draw: _with(_Decode()(draw), "mixed_qkv", 0.0)
    # Gates beyond the range of exp.
    yield "large gates", _Decode(gates=300.0)
    # From where softplus is nearly its argument to where it is that though exp overflows; little is forgotten.
    yield "gates up to 20", lambda draw: _with_gates_up_to(20.0, _with(_Decode()(draw), "A_log", -3.0))
    yield "gates up to 150", lambda draw: _with_gates_up_to(150.0, _with(_Decode()(draw), "A_log", -6.0))
    yield "everything is forgotten at once", lambda draw: _with(_Decode()(draw), "A_log", 60.0)


OPERATORS = {
    "chunk_gated_delta_rule": Operator(
        _chunk_forms,
        _chunk_unusual,
        partial(_special, partial(_chunk)),
        lambda call: exact.chunk_gated_delta_rule(*call.inputs.values()),
        captured=False,
    ),
    "fused_recurrent_gated_delta_rule": Operator(
        _recurrent_forms,
        _recurrent_unusual,
        partial(_special, partial(_recurrent)),
        lambda call: exact.fused_recurrent_gated_delta_rule(*call.inputs.values()),
        captured=False,
    ),
    "fused_recurrent_gated_delta_rule_packed_decode": Operator(
        _decode_forms,
        _decode_unusual,
        _decode_special,
        lambda call: exact.fused_recurrent_gated_delta_rule_packed_decode(*call.inputs.values()),
    ),
}
