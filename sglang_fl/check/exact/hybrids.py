# SPDX-License-Identifier: Apache-2.0
"""The functions around the attention of hybrid models, in float64. Splits of projections are copies, head by head."""

from dataclasses import replace

import torch

from .activation import with_sigmoid
from .judge import U32, Exact, Same, exactly
from .normalization import gemma_rms_norm, layer_norm, rms_norm


def _gate(z: torch.Tensor, activation: str) -> Exact:
    wide = exactly(z)
    ones = torch.ones_like(wide)
    return with_sigmoid(wide, ones if activation == "sigmoid" else wide, ones, argument=1)[0]


def gated_norm(
    x: torch.Tensor,
    z: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = True,
    activation: str = "swish",
    residual: torch.Tensor | None = None,
) -> tuple[Exact, ...]:
    """``norm(x + residual) * gate(z)``, or ``norm(x * gate(z))``. With a residual also ``x + residual``."""
    gate = None if z is None else _gate(z.reshape(x.shape), activation)
    hidden, terms = exactly(x), torch.zeros(())
    if residual is not None:
        hidden = hidden + exactly(residual)
    if gate is not None and not norm_before_gate:
        # Each result of the norm may have as many roundings as the worst of its inputs.
        hidden, terms = hidden * gate.value, (gate.terms / gate.value.abs()).nan_to_num().clamp(max=1 / U32).amax(-1, keepdim=True)
    size = group_size or x.shape[-1]
    groups, weights = (part.unflatten(-1, (-1, size)) for part in (hidden, exactly(weight)))
    zeros = torch.zeros(()).double().expand(weights.shape)
    if is_rms_norm:
        (normed,) = rms_norm(groups, weights, eps, None)
    else:
        (normed,) = layer_norm(groups, weights, zeros, eps)
    value, sizes, lost = (part.flatten(-2) for part in (normed.value, normed.terms, torch.as_tensor(normed.lost).expand(groups.shape)))
    if bias is not None:
        value, sizes = value + exactly(bias), sizes + exactly(bias).abs()
    sizes = sizes + value.abs() * (1 + terms)
    if gate is not None and norm_before_gate:
        sizes = sizes * gate.value.abs() + value.abs() * gate.terms
        lost = lost * gate.value.abs() + value.abs() * torch.as_tensor(gate.lost)
        value = value * gate.value
    result = Exact("result", value, sizes, normed.roundings + 16, lost)
    return (result,) if residual is None else (result, Exact("the sum", hidden, hidden.abs(), 1, dtype=residual.dtype))


def qk_gemma_norms(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_dim: int,
    num_heads: int | None = None,
) -> tuple[Exact | Same, ...]:
    """The norm of each head. With ``num_heads`` the second half of each head of q is its gate, which is copied."""
    gated = num_heads is not None
    heads = q.reshape(-1, (1 + gated) * head_dim)
    pairs = (("q", heads[:, :head_dim], q_weight), ("k", k.reshape(-1, head_dim), k_weight))
    norms = [replace(gemma_rms_norm(x, weight, eps, None)[0], name=name) for name, x, weight in pairs]
    return (*norms, Same("gate", heads[:, head_dim:].cpu())) if gated else tuple(norms)


def sigmoid_mul(attn_output: torch.Tensor, gate: torch.Tensor) -> tuple[Exact, ...]:
    wide = exactly(attn_output)
    return with_sigmoid(exactly(gate).reshape(wide.shape), wide, torch.ones_like(wide), argument=1)


def gated_expert(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor | None = None,
) -> tuple[Exact, ...]:
    """``shared_output * sigmoid(hidden_states @ gate_weight)``, plus ``final_hidden_states`` if given."""
    products, shared = exactly(hidden_states) * exactly(gate_weight), exactly(shared_output)
    gate = products.sum(-1, keepdim=True).sigmoid()
    # An error of the sum changes the gate by that error times the sigmoid's slope.
    terms = shared.abs() * (gate + gate * (1 - gate) * products.abs().sum(-1, keepdim=True))
    value, roundings = shared * gate, 16 + len(gate_weight).bit_length()
    if final_hidden_states is not None:
        value, terms = value + exactly(final_hidden_states), terms + exactly(final_hidden_states).abs()
    return (Exact("result", value, terms, roundings),)


def taken_apart(mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, num_heads_v: int, head_v: int) -> tuple[Same, ...]:
    """qkv ``[tokens, q + k + v]``, z ``[tokens, num_heads_v, head_v]``, b and a ``[tokens, num_heads_v]``, one after the other."""
    widths = [mixed_qkvz.shape[1] - num_heads_v * head_v, num_heads_v * head_v]
    (qkv, z), (b, a) = mixed_qkvz.cpu().split(widths, 1), mixed_ba.cpu().chunk(2, 1)
    return _taken_apart(qkv, z.unflatten(1, (num_heads_v, head_v)), b, a)


def taken_apart_by_head(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> tuple[Same, ...]:
    """The same, where each key head has all its parts together."""
    group = num_heads_v // num_heads_qk
    of_heads = (x.cpu().unflatten(1, (num_heads_qk, -1)) for x in (mixed_qkvz, mixed_ba))
    widths = [head_qk, head_qk, group * head_v, group * head_v], [group, group]
    q, k, v, z, b, a = (part.flatten(1) for x, width in zip(of_heads, widths, strict=True) for part in x.split(width, -1))
    return _taken_apart(torch.cat([q, k, v], 1), z.unflatten(1, (num_heads_v, head_v)), b, a)


def _taken_apart(*parts: torch.Tensor) -> tuple[Same, ...]:
    return tuple(Same(name, part.clone()) for name, part in zip(("qkv", "z", "b", "a"), parts, strict=True))


def split(
    mixed_qkv: torch.Tensor, num_heads_q: int, num_heads_k: int, num_heads_v: int, head_q: int, head_k: int, head_v: int
) -> tuple[Same, ...]:
    """q, k and v, each ``[1, tokens, heads, head_dim]``."""
    shapes = (num_heads_q, head_q), (num_heads_k, head_k), (num_heads_v, head_v)
    parts = mixed_qkv.cpu().split([heads * size for heads, size in shapes], 1)
    return tuple(Same(name, part.unflatten(1, shape).unsqueeze(0)) for name, part, shape in zip("qkv", parts, shapes, strict=True))
