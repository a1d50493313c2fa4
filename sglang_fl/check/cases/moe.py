# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..exact import moe as exact
from ..exact.moe import Experts, Routing
from .call import Call, Draw, Form, Layer, Operator
from .models import numbers, sizes

#: The scores of the last chosen and the first unchosen expert differ by more than this.
_GAP = 1e-4


@dataclass
class ExpertsCall(Call):
    """A call of fused_moe, whose tensors are in SGLang's containers."""

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, weights, ids = self.inputs.values()
        routed = SimpleNamespace(topk_weights=weights, topk_ids=ids, router_logits=None)
        return (Layer(), self.layer, SimpleNamespace(hidden_states=x, hidden_states_scale=None, topk_output=routed)), {}


@dataclass(frozen=True)
class RoutingForm(Form):
    """A routing call: SGLang's options, and the sizes.

    Attributes:
        bias, logits: their dtypes. Empty: no bias, and the dtype of the activations.
        offset: added to the bias.
        groups, topk_group: the number of groups, and how many are kept. 0: no groups.
        factor, shared_factor: 0: none.
        real: the tokens before the padding. -1: not given.
        scalar: that number is a tensor without dimensions.
    """

    tokens: int = 9
    experts: int = 64
    top_k: int = 8
    scoring: str = "softmax"
    as_they_are: bool = False
    bias: str = ""
    offset: float = 0.0
    groups: int = 0
    topk_group: int = 0
    shared: bool = False
    factor: float = 0.0
    on_output: bool = False
    shared_factor: float = 0.0
    real: int = -1
    scalar: bool = False
    logits: str = ""

    def call(self, draw: Draw) -> Call:
        layer: Any = Layer()
        bias = draw.normal(self.experts, scale=0.1, offset=self.offset, dtype=getattr(torch, self.bias)) if self.bias else None
        layer.e_score_correction_bias = None if bias is None else _parameter(bias)
        layer.topk_config = self._config(layer.e_score_correction_bias)
        logits = self._without_ties(draw, bias)
        if self.values:
            _CHANGES[self.values](logits)
        logits = draw.laid_out(draw.place(logits, getattr(torch, self.logits) if self.logits else None), self.layout)
        real = None if self.real < 0 else torch.full(() if self.scalar else (1,), self.real, dtype=torch.int32, device=draw.device)
        named = {"num_token_non_padded": real, "expert_location_dispatch_info": None}
        inputs = {"hidden_states": draw.normal(self.tokens, 32), "router_logits": logits, **named}
        return Call(layer, inputs, named=frozenset(named), meaning={"routing": self._meaning()})

    def _config(self, bias: torch.Tensor | None) -> SimpleNamespace:
        return SimpleNamespace(
            top_k=self.top_k + self.shared,
            scoring_func=self.scoring,
            renormalize=not self.as_they_are,
            correction_bias=bias,
            use_grouped_topk=self.groups > 0,
            num_expert_group=self.groups or None,
            topk_group=self.topk_group or None,
            num_shared_topk_slots=int(self.shared),
            routed_scaling_factor=self.factor or None,
            apply_routed_scaling_factor_on_output=self.on_output,
            fused_shared_experts_scaling_factor=self.shared_factor or None,
        )

    def _meaning(self) -> Routing:
        # If the layer scales its output later, the shared expert's weight compensates for it.
        shared = (1.0 if self.on_output or not self.factor else 1 / self.factor) * (self.shared_factor or 1.0)
        return Routing(
            top_k=self.top_k,
            scoring="sigmoid" if self.groups and self.bias else self.scoring,
            renormalize=not self.as_they_are,
            groups=self.groups or 1,
            topk_group=self.topk_group or 1,
            scale=self.factor if self.on_output and self.factor else 1.0,
            shared_weight=shared if self.shared else None,
        )

    def _without_ties(self, draw: Draw, bias: torch.Tensor | None) -> torch.Tensor:
        """Logits that differ in every dtype, with choices that rounding cannot change."""
        logits = self._distinct(draw, self.tokens)
        if bias is None and not self.groups:
            return logits
        routing = self._meaning()
        for _ in range(1000):
            near = exact.topk(logits, bias, routing)[0].gap < _GAP
            if not bool(near.any()):
                return logits
            logits[near] = self._distinct(draw, int(near.sum()))
        raise ValueError(f"{self} always has choices too close to each other")

    def _distinct(self, draw: Draw, tokens: int) -> torch.Tensor:
        order = torch.rand(tokens, self.experts, generator=draw.rng).argsort(dim=-1)
        return (order - self.experts // 2) / 32


def _nan(logits: torch.Tensor) -> None:
    logits[0, 3], logits[1, 5], logits[2] = torch.nan, -torch.inf, torch.nan


#: Logits for which the divisor of the weights is about 1e-9 (small), or zero in fp32 (none).
_CHANGES = {
    "nan": _nan,
    "alike": lambda logits: logits.zero_(),
    "far-apart": lambda logits: logits.mul_(40),
    "small": lambda logits: logits.sub_(22),
    "none": lambda logits: logits.fill_(-200),
}

_SIGMOID = "scoring=sigmoid bias=float32"
#: The logits of a view are part of a wider product, as Kimi K3's are, which has sigmoids and a bias.
_TOPK_UNUSUAL = f"""
tokens=0 | top_k=1 | experts=16 top_k=16 | as_they_are | factor=2.5 {{,on_output}} | logits=float32 | layout={{view,odd-view}}
| real=0 | real=9 | real={{4,40}} scalar | scoring=sigmoid | {_SIGMOID} {{as_they_are,offset=-8,real=5,experts=60 top_k=6,layout=view}}
| scoring=sigmoid bias=bfloat16 | {_SIGMOID} shared factor=2.5 | {_SIGMOID} experts=256 groups=1 topk_group=1
| {_SIGMOID} experts=256 groups=4 topk_group=4 | bias=float32 experts=256 groups=8 topk_group=4
| {_SIGMOID} experts=256 groups=8 topk_group=4 {{real=3,offset=-8}}
| {_SIGMOID} experts=256 groups=8 topk_group=4 shared factor=2.5 {{on_output,on_output real=3,shared_factor=0.5}}
| experts=160 top_k=6 groups=8 topk_group=3 {{factor=16 as_they_are,scoring=sigmoid}}
"""
#: From one expert a token to 22, among 8 to 512.
_TOPK_SIZES = f"""
tokens=3 {{{sizes("experts", "top_k")}}} {{,{_SIGMOID}}} | tokens=3 {{{sizes("experts", "top_k", "groups", "topk_group")}}} {_SIGMOID}
| tokens=17 experts=512 top_k={{9,10,12,16,22}} {{,{_SIGMOID}}}
| tokens=17 experts=384 {_SIGMOID} factor=2.5 on_output | tokens=3 layout=far
"""


@dataclass(frozen=True)
class ExpertsForm(Form):
    """A call of experts: SGLang's options, and the sizes.

    Attributes:
        elsewhere: the share of choices that are experts of another rank.
        unchosen: the first of every this many experts has no token.
        busy: only so many experts have tokens. 0: all.
        total: the sum of a token's weights.
        own_weights: the weights are of the model's dtype, as Llama 4's.
    """

    tokens: int = 9
    hidden: int = 64
    size: int = 32
    experts: int = 8
    top_k: int = 2
    activation: str = "silu"
    not_gated: bool = False
    bias: bool = False
    weight_on_input: bool = False
    elsewhere: float = 0.0
    unchosen: int = 0
    busy: int = 0
    total: float = 1.0
    own_weights: bool = False
    ids: str = "int32"

    def call(self, draw: Draw) -> Call:
        rows = self.size if self.not_gated else 2 * self.size
        layer: Any = Layer()
        layer.w13_weight = _parameter(draw.normal(self.experts, rows, self.hidden, scale=self.hidden**-0.5))
        layer.w2_weight = _parameter(draw.normal(self.experts, self.hidden, self.size, scale=self.size**-0.5))
        if self.bias:
            layer.w13_weight_bias = _parameter(draw.normal(self.experts, rows, dtype=torch.float32))
            layer.w2_weight_bias = _parameter(draw.normal(self.experts, self.hidden, dtype=torch.float32))
        layer.moe_runner_config = SimpleNamespace(
            activation=self.activation,
            is_gated=not self.not_gated,
            apply_router_weight_on_input=self.weight_on_input,
            num_experts=self.experts * (2 if self.elsewhere else 1),
            num_local_experts=self.experts,
        )
        order = torch.rand(self.tokens, self.experts, generator=draw.rng)
        if self.unchosen:
            order[:, :: self.unchosen] = 2.0
        if self.busy:
            order[:, self.busy :] += 1.0
        ids = order.argsort(dim=-1)[:, : self.top_k]
        ids.masked_fill_(torch.rand(ids.shape, generator=draw.rng) < self.elsewhere, -1)
        weights = torch.rand(ids.shape, generator=draw.rng) + 0.1
        weights *= self.total / weights.sum(-1, keepdim=True)
        x = draw.normal(self.tokens, self.hidden)
        if self.values == "zeros":
            x.zero_()
        elif self.values == "nan":
            x[3] = torch.nan
        elif self.values == "nan-in-padding":
            x[6:], ids[6:], weights[6:] = torch.nan, -1, torch.nan
        elif self.values == "nan-in-an-expert-of-no-token":
            ids[ids == 0] = -1
            layer.w13_weight.data[0] = torch.nan
        inputs = {
            "hidden_states": draw.laid_out(x, self.layout),
            "topk_weights": draw.place(weights, draw.dtype if self.own_weights else torch.float32),
            "topk_ids": draw.index(ids, self.ids),
        }
        return ExpertsCall(layer, inputs, meaning={"experts": Experts(self.activation, not self.not_gated, self.weight_on_input)})


def _parameter(x: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


_EXPERTS_UNUSUAL = """
tokens=0 | tokens=1 | experts=1 top_k=1 | top_k=8 | elsewhere=1.0 | experts=60 hidden=72 size=40 top_k=6 | total=2.5
| ids=int64 elsewhere=0.3 | bias {,elsewhere=0.5} | weight_on_input {,top_k=1} | own_weights {,weight_on_input top_k=1}
| activation={gelu,gelu_tanh,relu2} | activation={silu,gelu,gelu_tanh,relu2} not_gated
| unchosen={2,3} tokens=40 | busy=2 tokens=80 | layout={view,every-other}
"""
#: Full weights of all experts would fill the memory. So numbers of experts, hidden sizes and experts' sizes vary one at a time.
_EXPERTS_SIZES = f"""
tokens=17 {{{sizes("experts", "top_k")}}} | tokens=3 hidden={{{numbers("hidden")}}} experts=4
| tokens=3 size={{{numbers("moe_width")}}} experts=4 | tokens=17 experts=512 top_k={{9,16,22}} | tokens=3 layout=far
"""


OPERATORS = {
    "topk": Operator(
        RoutingForm(),
        f"experts=128 {{,real=13}} | experts=256 {_SIGMOID} groups=8 topk_group=4 factor=2.5 on_output",
        exact.topk,
        sizes=_TOPK_SIZES,
        many=f"tokens={{4097,65537}} experts=16 top_k=2 {{,{_SIGMOID}}} | tokens=4097 experts=16 top_k=2 real=4000"
        f" | tokens=4097 experts=16 top_k=2 {_SIGMOID} groups=4 topk_group=2",
        vast=f"tokens=8192 experts=256 {_SIGMOID} groups=8 topk_group=4",
        unusual=_TOPK_UNUSUAL,
        special=f"{{,{_SIGMOID}}} values={{nan,far-apart}} | values=alike | {_SIGMOID} values={{small,none}}",
        whole=True,
        tokens_in={"hidden_states": 0, "router_logits": 0},
    ),
    "fused_moe": Operator(
        ExpertsForm(),
        "hidden=1024 size=32 {,experts=16 elsewhere=0.5}",
        exact.fused_moe,
        sizes=_EXPERTS_SIZES,
        many="tokens={1025,4097,65537} hidden=32",
        vast="tokens=8192 hidden=1024 size=32",
        unusual=_EXPERTS_UNUSUAL,
        special="elsewhere=0.3 values=nan | values={nan-in-padding,nan-in-an-expert-of-no-token,zeros}",
        tokens_in={"hidden_states": 0, "topk_weights": 0, "topk_ids": 0},
    ),
}
