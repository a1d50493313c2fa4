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
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, head_dim: int, *, gated: bool
) -> tuple[Exact | Same, ...]:
    """The norm of each head. With ``gated`` the second half of each head of q is its gate, which is copied."""
    heads = q.reshape(-1, (1 + gated) * head_dim)
    pairs = (("q", heads[:, :head_dim], q_weight), ("k", k.reshape(-1, head_dim), k_weight))
    norms = [replace(gemma_rms_norm(x, weight, eps, None)[0], name=name) for name, x, weight in pairs]
    return (*norms, Same("gate", heads[:, head_dim:].cpu())) if gated else tuple(norms)


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> tuple[Exact, ...]:
    wide = exactly(x)
    return with_sigmoid(exactly(gate).reshape(x.shape), wide, torch.ones_like(wide), argument=1)


def gated_expert(
    hidden_states: torch.Tensor, weight: torch.Tensor, shared: torch.Tensor, added_to: torch.Tensor | None = None
) -> tuple[Exact, ...]:
    """``shared * sigmoid(hidden_states @ weight)``, plus ``added_to`` if given."""
    products = exactly(hidden_states) * exactly(weight)
    gate = products.sum(-1, keepdim=True).sigmoid()
    # An error of the sum changes the gate by that error times the sigmoid's slope.
    terms = exactly(shared).abs() * (gate + gate * (1 - gate) * products.abs().sum(-1, keepdim=True))
    value, roundings = exactly(shared) * gate, 16 + len(weight).bit_length()
    if added_to is not None:
        value, terms = value + exactly(added_to), terms + exactly(added_to).abs()
    return (Exact("result", value, terms, roundings),)


def taken_apart(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, key_heads: int, value_heads: int, key_dim: int, value_dim: int, *, by_head: bool
) -> tuple[Same, ...]:
    """qkv ``[tokens, q + k + v]``, z ``[tokens, value_heads, value_dim]``, b and a ``[tokens, value_heads]``, copied head by head."""
    group, qkvz, ba = value_heads // key_heads, mixed_qkvz.cpu(), mixed_ba.cpu()
    if not by_head:
        qkv, z = qkvz.split([qkvz.shape[1] - value_heads * value_dim, value_heads * value_dim], 1)
        parts = [qkv, z.unflatten(1, (value_heads, value_dim)), ba[:, :value_heads], ba[:, value_heads:]]
    else:
        found: list[list[torch.Tensor]] = [[] for _ in range(6)]
        for head in range(key_heads):
            places = [(qkvz, head * (2 * key_dim + 2 * group * value_dim)), (ba, head * 2 * group)]
            for number, width in enumerate((key_dim, key_dim, group * value_dim, group * value_dim, group, group)):
                source, at = places[number // 4]
                found[number].append(source[:, at : at + width])
                places[number // 4] = source, at + width
        q, k, v, z, b, a = (torch.cat(part, 1) for part in found)
        parts = [torch.cat([q, k, v], 1), z.unflatten(1, (value_heads, value_dim)), b, a]
    return tuple(Same(name, part.clone()) for name, part in zip(("qkv", "z", "b", "a"), parts, strict=True))


def split(mixed_qkv: torch.Tensor, shapes: tuple[tuple[int, int], ...]) -> tuple[Same, ...]:
    """q, k and v, each ``[1, tokens, heads, head_dim]``."""
    found, at = [], 0
    for name, (heads, size) in zip("qkv", shapes, strict=True):
        found.append(Same(name, mixed_qkv.cpu()[:, at : at + heads * size].reshape(1, -1, heads, size)))
        at += heads * size
    return tuple(found)
