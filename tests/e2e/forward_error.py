# SPDX-License-Identifier: Apache-2.0
"""How far two correct evaluations of a small model may differ in the logprobs of a prompt.

First-order forward error analysis (Higham, Accuracy and Stability of Numerical Algorithms, ch. 3): an
operator's result ``t`` is wrong by at most ``roundings * u * terms``, where ``terms`` is the sum of the
sizes of what it adds up. To first order that moves a logprob by ``|d logprob / d t|`` times as much.
The gradients come from the model itself in float64, with the same weights. In bf16 or fp16 the operators
still work in fp32 inside, and each number of a result is rounded ``OUTPUT`` times to its own type.

The errors of one row of one operator may all point the same way (a norm scales its whole row by one
rounded number): their sizes are added. Those of different rows and operators are independent: their
squares are added, and the sum is within ``CONFIDENCE`` times the root but for a chance of
``2 exp(-CONFIDENCE ** 2 / 2)``, 4e-8 (Higham and Mary 2019, A New Approach to Probabilistic Rounding
Error Analysis). Two evaluations may differ by twice the bound of one.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

U32 = torch.finfo(torch.float32).eps / 2
#: fp32 roundings inside each operator, relative to its terms. Sums of n numbers: a blocked summation,
#: eight numbers in a row in each block, costs 8 + log2(n) roundings.
_ELEMENTWISE = 8
#: Roundings to the activation's type: SGLang's own operators round up to three times, ours once.
OUTPUT = 3
CONFIDENCE = 6.0
#: How many of the narrowest choices of experts are looked at.
_CLOSEST = 6


def _sum(n: int) -> float:
    return 8 + math.log2(max(2, n))


class _Tape:
    """The operators' results, with the size of the terms behind each and their roundings."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.u = torch.finfo(dtype).eps / 2
        self.entries: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def add(self, result: torch.Tensor, terms: torch.Tensor, roundings: float) -> torch.Tensor:
        result.retain_grad()
        self.entries.append((result, terms.detach(), roundings))
        return result

    def bound(self) -> float:
        squares = 0.0
        for result, terms, roundings in self.entries:
            if result.grad is not None:
                rows = roundings * U32 * (result.grad.abs() * terms).sum(-1)
                each = OUTPUT * self.u * result.grad * terms
                squares += float(rows.square().sum() + each.square().sum())
                result.grad = None
        return CONFIDENCE * math.sqrt(squares)


@contextmanager
def recorded_experts(model: nn.Module, tape: _Tape) -> Iterator[list[torch.Tensor]]:
    """Routers and experts, in float64 throughout.

    Yields:
        for each router that ran, ``[num_tokens]``: by how much the logit of a token's last expert leads the next one's.
    """
    leads: list[torch.Tensor] = []

    def route(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = hidden.reshape(-1, router.hidden_dim)
        logits = tape.add(hidden @ router.weight.T, hidden.abs() @ router.weight.abs().T, _sum(router.hidden_dim))
        weights, chosen = logits.softmax(-1).topk(router.top_k, dim=-1)
        best = logits.topk(router.top_k + 1, dim=-1).values
        leads.append(best[:, -2] - best[:, -1])
        if router.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, tape.add(weights, weights, _ELEMENTWISE + _sum(router.num_experts)), chosen

    def compute(experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out, terms = torch.zeros_like(hidden), torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            rows, columns = (chosen == expert).nonzero(as_tuple=True)
            x, up_matrix, down_matrix = hidden[rows], experts.gate_up_proj[expert], experts.down_proj[expert]
            both = tape.add(x @ up_matrix.T, x.abs() @ up_matrix.abs().T, _sum(x.shape[-1]))
            gate, up = both.chunk(2, dim=-1)
            inner = experts.act_fn(gate) * up
            inner = tape.add(inner, inner.abs(), _ELEMENTWISE)
            y = tape.add(inner @ down_matrix.T, inner.abs() @ down_matrix.abs().T, _sum(inner.shape[-1]))
            y = y * weights[rows, columns, None]
            out, terms = out.index_add(0, rows, y), terms.index_add(0, rows, y.abs())
        return tape.add(out, terms, _ELEMENTWISE)

    ways = {"TopKRouter": route, "Experts": compute}
    changed = []
    for module in model.modules():
        way = next((way for end, way in ways.items() if type(module).__name__.endswith(end)), None)
        if way is not None:
            module.forward = MethodType(way, module)  # type: ignore[method-assign]
            changed.append(module)
    yield leads
    for module in changed:
        del module.forward


class OnTheEdge(Exception):
    """Rounding may give a token other experts, and what comes then no bound of first order says.

    Attributes:
        position: the token's, the first such.
    """

    def __init__(self, position: int):
        super().__init__(f"the token at {position} may get other experts by rounding alone")
        self.position = position


def check_choices(leads: list[torch.Tensor], tape: _Tape) -> None:
    """Raises OnTheEdge if rounding may exchange a token's experts; the narrowest choices are looked at."""
    ordered = sorted(((lead, position) for of_router in leads for position, lead in enumerate(of_router)), key=lambda pair: pair[0].item())
    edges = []
    for lead, position in ordered[:_CLOSEST]:
        lead.backward(retain_graph=True)
        if lead.item() <= 2 * tape.bound():
            edges.append(position)
    if edges:
        raise OnTheEdge(min(edges))


@contextmanager
def _recorded(model: nn.Module, tape: _Tape) -> Iterator[None]:
    """The operators of one of transformers' models; what it is made of has the same names in all of them."""
    modeling: Any = sys.modules[type(model).__module__]

    def linear(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return tape.add(output, inputs[0].abs() @ module.weight.abs().T, _sum(module.in_features))

    def elementwise(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return tape.add(output, output.abs(), _ELEMENTWISE)

    def norm(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return tape.add(output, output.abs(), _ELEMENTWISE + _sum(output.shape[-1]))

    def gelu(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # Left of zero it is the difference of two numbers of half its input's size.
        return tape.add(output, inputs[0].abs(), _ELEMENTWISE)

    handles = []
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(linear))
        elif name.endswith("RMSNorm"):
            handles.append(module.register_forward_hook(norm))
        elif name.startswith("GELU"):
            handles.append(module.register_forward_hook(gelu))
        elif name.endswith(("MLP", "DecoderLayer", "ScaledWordEmbedding")) or name.startswith("SiLU"):
            handles.append(module.register_forward_hook(elementwise))

    rotary, attention = modeling.apply_rotary_pos_emb, modeling.eager_attention_forward

    def recorded_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **named: Any) -> Any:
        results = rotary(q, k, cos, sin, *rest, **named)
        for x, result in zip((q, k), results, strict=True):
            terms = (x * cos.unsqueeze(1)).abs() + (modeling.rotate_half(x) * sin.unsqueeze(1)).abs()
            tape.add(result, terms, _ELEMENTWISE)
        return results

    def recorded_attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any) -> Any:
        output, weights = attention(module, q, k, v, *rest, **named)
        terms, _ = attention(module, q, k, v.abs(), *rest, **named)
        # A score is a sum of head_dim products, and the softmax turns its error into a relative one.
        scores = float(q.detach().norm(dim=-1).max() * k.detach().norm(dim=-1).max()) / math.sqrt(q.shape[-1])
        return tape.add(output, terms, _sum(k.shape[2]) + _sum(q.shape[-1]) * max(1.0, scores)), weights

    modeling.apply_rotary_pos_emb, modeling.eager_attention_forward = recorded_rotary, recorded_attention
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb, modeling.eager_attention_forward = rotary, attention
        for handle in handles:
            handle.remove()


def logprobs_and_bounds(model_path: Path, tokens: list[int], dtype: torch.dtype = torch.float32) -> tuple[list[float], list[float]]:
    """The exact logprob of each token but the first, and how far one evaluation in ``dtype`` may be from it.

    Raises:
        OnTheEdge: rounding may route a token of a mixture of experts another way.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64, attn_implementation="eager")
    tape = _Tape(dtype)
    with _recorded(model, tape), recorded_experts(model, tape) as leads:
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
    check_choices(leads, tape)
    wanted = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1)).squeeze(-1)
    bounds = []
    for logprob in wanted:
        logprob.backward(retain_graph=True)
        bounds.append(tape.bound() + _sum(logits.shape[-1]) * U32 * max(1.0, abs(float(logprob.detach()))))
    return wanted.detach().tolist(), bounds
