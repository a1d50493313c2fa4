# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..exact import moe as exact
from ..exact.judge import Exact
from ..exact.moe import Experts, Routed, Routing
from .call import Call, Draw, Layer, Named, Operator

#: Two experts' choices differ by more than this at the place where one is taken and the other is not.
_GAP = 1e-4


@dataclass
class RoutingCall(Call):
    """A call of topk, and what its options mean; not read from its configuration, which is the implementation's to understand."""

    routing: Routing | None = None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_states, router_logits, real = (self.inputs[name] for name in ("hidden_states", "router_logits", "num_token_non_padded"))
        return (self.layer, hidden_states, router_logits), {"num_token_non_padded": real, "expert_location_dispatch_info": None}


@dataclass
class ExpertsCall(Call):
    """A call of fused_moe, and what its options mean."""

    experts: Experts | None = None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, weights, ids = self.inputs.values()
        routed = SimpleNamespace(topk_weights=weights, topk_ids=ids, router_logits=None)
        return (Layer(), self.layer, SimpleNamespace(hidden_states=x, hidden_states_scale=None, topk_output=routed)), {}


@dataclass(frozen=True)
class _Routing:
    """A routing call: SGLang's options, and the sizes."""

    tokens: int = 9
    experts: int = 64
    top_k: int = 8
    scoring: str = "softmax"
    renormalize: bool = True
    bias: torch.dtype | None = None
    #: Added to the bias.
    offset: float = 0.0
    groups: tuple[int, int] | None = None
    shared: bool = False
    factor: float | None = None
    on_output: bool = False
    shared_factor: float | None = None
    real: int | None = None
    real_shape: tuple[int, ...] = (1,)
    logits_dtype: torch.dtype | None = None
    packed: bool = False

    def __call__(self, draw: Draw) -> Call:
        layer: Any = Layer()
        bias = None if self.bias is None else draw.normal(self.experts, scale=0.1, dtype=self.bias).add_(self.offset)
        layer.e_score_correction_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        layer.topk_config = self._config(layer.e_score_correction_bias)
        logits = draw.place(self._without_ties(draw, bias), self.logits_dtype)
        guarded = {}
        if self.packed:
            wide = torch.cat((torch.zeros_like(logits), logits, torch.zeros_like(logits)), dim=-1)
            guarded["the columns around"] = wide[:, : self.experts]
            logits = wide[:, self.experts : 2 * self.experts]
        real = None if self.real is None else torch.full(self.real_shape, self.real, dtype=torch.int32, device=draw.device)
        inputs = {"hidden_states": draw.normal(self.tokens, 32), "router_logits": logits, "num_token_non_padded": real}
        return RoutingCall(layer, inputs, guarded=guarded, routing=self._meaning())

    def _config(self, bias: torch.Tensor | None) -> SimpleNamespace:
        return SimpleNamespace(
            top_k=self.top_k + self.shared,
            scoring_func=self.scoring,
            renormalize=self.renormalize,
            correction_bias=bias,
            use_grouped_topk=self.groups is not None,
            num_expert_group=self.groups[0] if self.groups else None,
            topk_group=self.groups[1] if self.groups else None,
            num_shared_topk_slots=int(self.shared),
            routed_scaling_factor=self.factor,
            apply_routed_scaling_factor_on_output=self.on_output,
            fused_shared_experts_scaling_factor=self.shared_factor,
        )

    def _meaning(self) -> Routing:
        groups, topk_group = self.groups or (1, 1)
        shared: float | None = None
        if self.shared:
            # Where the layer scales its output later, the shared expert's weight makes up for it.
            shared = 1.0 if self.on_output or not self.factor else 1 / self.factor
            shared *= 1.0 if self.shared_factor is None else self.shared_factor
        return Routing(
            top_k=self.top_k,
            scoring="sigmoid" if self.groups and self.bias else self.scoring,
            renormalize=self.renormalize,
            groups=groups,
            topk_group=topk_group,
            scale=self.factor if self.on_output and self.factor is not None else 1.0,
            shared_weight=shared,
        )

    def _without_ties(self, draw: Draw, bias: torch.Tensor | None) -> torch.Tensor:
        """Logits that every dtype tells apart, and choices among them that rounding cannot change."""
        logits = self._distinct(draw, self.tokens)
        if bias is None and self.groups is None:
            return logits
        routing = self._meaning()
        for _ in range(1000):
            near = exact.topk(logits, bias, routing)[0].gap < _GAP
            if not bool(near.any()):
                return logits
            logits[near] = self._distinct(draw, int(near.sum()))
        raise ValueError(f"{self} has choices that are always too near to each other")

    def _distinct(self, draw: Draw, tokens: int) -> torch.Tensor:
        order = torch.rand(tokens, self.experts, generator=draw.rng).argsort(dim=-1)
        return (order - self.experts // 2) / 32


def _topk_forms(tokens: int, hidden: int) -> Iterator[Named]:
    experts = hidden // 32
    softmax = _Routing(tokens=tokens, experts=experts)
    yield f"softmax, {tokens} × 8 of {experts}", softmax
    yield f"softmax, {tokens} × 8 of {experts}, padded", replace(softmax, real=tokens - tokens // 4)
    sigmoid = replace(softmax, scoring="sigmoid", bias=torch.float32, groups=(8, 4), factor=2.5, on_output=True)
    yield f"sigmoid, bias, {tokens} × 8 of {experts} in 4 of 8 groups", sigmoid


def _topk_unusual() -> Iterator[Named]:
    softmax, sigmoid = _Routing(), _Routing(scoring="sigmoid", bias=torch.float32)
    yield "no tokens", replace(softmax, tokens=0)
    yield "one expert a token", replace(softmax, top_k=1)
    yield "every expert", replace(softmax, experts=16, top_k=16)
    yield "6 of 60 experts", replace(softmax, experts=60, top_k=6)
    yield "10 of 512 experts", replace(softmax, experts=512, top_k=10)
    yield "weights as they are", replace(softmax, renormalize=False)
    yield "scaled", replace(softmax, factor=2.5, on_output=True)
    yield "a factor that the experts apply", replace(softmax, factor=2.5)
    yield "logits in fp32", replace(softmax, logits_dtype=torch.float32)
    yield "logits are columns of a wider tensor", replace(softmax, packed=True)
    for real, shape in ((0, (1,)), (9, (1,)), (4, ()), (40, ())):
        yield f"{real} tokens before the padding, shape {shape}", replace(softmax, real=real, real_shape=shape)
    yield "sigmoid", replace(sigmoid, bias=None)
    yield "sigmoid, weights as they are", replace(sigmoid, renormalize=False)
    yield "sigmoid, bias in bf16", replace(sigmoid, bias=torch.bfloat16)
    # Where bf16 has steps of 1/16, and every choice is below zero.
    yield "sigmoid, bias far below zero", replace(sigmoid, offset=-8.0)
    yield "sigmoid, padded", replace(sigmoid, real=5)
    yield "sigmoid, 6 of 60 experts", replace(sigmoid, experts=60, top_k=6)
    yield "sigmoid, a shared expert", replace(sigmoid, shared=True, factor=2.5)
    grouped = replace(sigmoid, experts=256, groups=(8, 4))
    yield "groups, one group of one", replace(grouped, groups=(1, 1))
    yield "groups, all kept", replace(grouped, groups=(4, 4))
    yield "groups, the bias makes it sigmoid", replace(grouped, scoring="softmax")
    yield "groups, a shared expert", replace(grouped, shared=True, factor=2.5, on_output=True)
    yield "groups, a shared expert, padded", replace(grouped, shared=True, factor=2.5, real=3)
    yield "groups, bias far below zero", replace(grouped, offset=-8.0)
    yield "groups, a shared expert on two ranks", replace(grouped, shared=True, factor=2.5, shared_factor=0.5)
    yield "groups, padded", replace(grouped, real=3)
    yield "groups by their best, softmax", replace(softmax, experts=160, top_k=6, groups=(8, 3), factor=16.0, renormalize=False)
    yield "groups by their best, sigmoid", replace(softmax, experts=160, top_k=6, groups=(8, 3), scoring="sigmoid")


def _topk_special() -> Iterator[Named]:
    def changed(draw: Draw, change: Callable[[torch.Tensor], None], form: _Routing) -> Call:
        call = form(draw)
        change(call.inputs["router_logits"])
        return call

    def ties(logits: torch.Tensor) -> None:
        logits.zero_()

    def nan_and_infinity(logits: torch.Tensor) -> None:
        logits[0, 3] = torch.nan
        logits[1, 5] = -torch.inf
        logits[2] = torch.nan

    def far_apart(logits: torch.Tensor) -> None:
        logits.mul_(40)

    def small(logits: torch.Tensor) -> None:
        logits.sub_(22)

    def none(logits: torch.Tensor) -> None:
        logits.fill_(-200)

    for name, form in (("softmax", _Routing()), ("sigmoid", _Routing(scoring="sigmoid", bias=torch.float32))):
        yield f"{name}, nan and infinity", partial(changed, change=nan_and_infinity, form=form)
        yield f"{name}, far apart", partial(changed, change=far_apart, form=form)
    yield "all experts alike", partial(changed, change=ties, form=_Routing())
    # What the weights are divided by is a sum of 1e-9, or of what fp32 takes for zero.
    sigmoid = _Routing(scoring="sigmoid", bias=torch.float32)
    yield "sigmoid, small scores", partial(changed, change=small, form=sigmoid)
    yield "sigmoid, scores of zero", partial(changed, change=none, form=sigmoid)


def _topk_exactly(call: Call) -> tuple[Routed, ...]:
    assert isinstance(call, RoutingCall) and call.routing is not None
    config: Any = call.layer.topk_config
    return exact.topk(call.inputs["router_logits"], config.correction_bias, call.routing, call.inputs["num_token_non_padded"])


@dataclass(frozen=True)
class _Experts:
    """A call of experts: SGLang's options, and the sizes."""

    tokens: int = 9
    hidden: int = 64
    size: int = 32
    experts: int = 8
    top_k: int = 2
    activation: str = "silu"
    is_gated: bool = True
    bias: bool = False
    weight_on_input: bool = False
    elsewhere: float = 0.0
    #: What a token's weights add up to.
    total: float = 1.0
    ids_dtype: torch.dtype = torch.int32

    def __call__(self, draw: Draw) -> Call:
        rows = 2 * self.size if self.is_gated else self.size
        layer: Any = Layer()
        layer.w13_weight = _parameter(draw.normal(self.experts, rows, self.hidden, scale=self.hidden**-0.5))
        layer.w2_weight = _parameter(draw.normal(self.experts, self.hidden, self.size, scale=self.size**-0.5))
        if self.bias:
            layer.w13_weight_bias = _parameter(draw.normal(self.experts, rows, dtype=torch.float32))
            layer.w2_weight_bias = _parameter(draw.normal(self.experts, self.hidden, dtype=torch.float32))
        layer.moe_runner_config = SimpleNamespace(
            activation=self.activation,
            is_gated=self.is_gated,
            apply_router_weight_on_input=self.weight_on_input,
            num_experts=self.experts * (2 if self.elsewhere else 1),
            num_local_experts=self.experts,
        )
        ids = torch.rand(self.tokens, self.experts, generator=draw.rng).argsort(dim=-1)[:, : self.top_k]
        away = torch.rand(self.tokens, self.top_k, generator=draw.rng) < self.elsewhere
        weights = torch.rand(self.tokens, self.top_k, generator=draw.rng) + 0.1
        inputs = {
            "hidden_states": draw.normal(self.tokens, self.hidden),
            "topk_weights": draw.place(weights * (self.total / weights.sum(-1, keepdim=True)), torch.float32),
            "topk_ids": draw.place(ids.masked_fill(away, -1), self.ids_dtype),
        }
        return ExpertsCall(layer, inputs, experts=Experts(self.activation, self.is_gated, self.weight_on_input))


def _parameter(x: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


def _fused_moe_forms(tokens: int, hidden: int) -> Iterator[Named]:
    # What costs time is float64 on the CPU, so that the weights stay small.
    form = _Experts(tokens=tokens, hidden=min(hidden, 1024), size=hidden // 32)
    yield f"{tokens} × 2 of 8 experts, {form.hidden} × {form.size}", form
    yield f"{tokens} × 2 of 16 experts, half of them here, {form.hidden} × {form.size}", replace(form, elsewhere=0.5)


def _fused_moe_unusual() -> Iterator[Named]:
    form = _Experts()
    yield "no tokens", replace(form, tokens=0)
    yield "one token", replace(form, tokens=1)
    yield "one expert", replace(form, experts=1, top_k=1)
    yield "every expert", replace(form, top_k=8)
    yield "all experts elsewhere", replace(form, elsewhere=1.0)
    yield "60 experts, sizes that nothing divides", replace(form, experts=60, hidden=72, size=40, top_k=6)
    yield "weights that add up to 2.5", replace(form, total=2.5)
    yield "ids in int64", replace(form, ids_dtype=torch.int64, elsewhere=0.3)
    yield "a bias", replace(form, bias=True)
    yield "a bias, experts elsewhere", replace(form, bias=True, elsewhere=0.5)
    yield "weights on the input", replace(form, weight_on_input=True, top_k=1)
    yield "weights on the input, two experts", replace(form, weight_on_input=True)
    for activation in ("gelu", "gelu_tanh", "relu2"):
        yield f"{activation}, gated", replace(form, activation=activation)
    for activation in ("silu", "gelu", "gelu_tanh", "relu2"):
        yield f"{activation}, not gated", replace(form, activation=activation, is_gated=False)


def _fused_moe_special() -> Iterator[Named]:
    def nan_in_a_token(draw: Draw) -> Call:
        call = _Experts(elsewhere=0.3)(draw)
        call.inputs["hidden_states"][3] = torch.nan
        return call

    def nan_in_padding(draw: Draw) -> Call:
        call = _Experts()(draw)
        call.inputs["hidden_states"][6:] = torch.nan
        call.inputs["topk_ids"][6:] = -1
        call.inputs["topk_weights"][6:] = torch.nan
        return call

    def nan_in_an_expert_of_no_token(draw: Draw) -> Call:
        call = _Experts()(draw)
        ids = call.inputs["topk_ids"]
        ids[ids == 0] = -1
        layer: Any = call.layer
        layer.w13_weight.data[0] = torch.nan
        return call

    def zeros(draw: Draw) -> Call:
        call = _Experts()(draw)
        call.inputs["hidden_states"].zero_()
        return call

    yield "nan in a token", nan_in_a_token
    yield "nan in padding", nan_in_padding
    yield "nan in an expert that no token goes to", nan_in_an_expert_of_no_token
    yield "zeros", zeros


def _fused_moe_exactly(call: Call) -> tuple[Exact, ...]:
    assert isinstance(call, ExpertsCall) and call.experts is not None
    layer: Any = call.layer
    return exact.fused_moe(
        call.inputs["hidden_states"],
        layer.w13_weight,
        layer.w2_weight,
        call.inputs["topk_weights"],
        call.inputs["topk_ids"],
        getattr(layer, "w13_weight_bias", None),
        getattr(layer, "w2_weight_bias", None),
        call.experts,
    )


OPERATORS = {
    "topk": Operator(
        _topk_forms, _topk_unusual, _topk_special, _topk_exactly, whole=True, tokens_in={"hidden_states": 0, "router_logits": 0}
    ),
    "fused_moe": Operator(
        _fused_moe_forms,
        _fused_moe_unusual,
        _fused_moe_special,
        _fused_moe_exactly,
        tokens_in={"hidden_states": 0, "topk_weights": 0, "topk_ids": 0},
    ),
}
