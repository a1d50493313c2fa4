# SPDX-License-Identifier: Apache-2.0
"""Functions around the gated delta rule in hybrid models: splitting of projections, gates, norms. Arithmetic is in fp32."""

import torch
from torch.nn.functional import sigmoid, silu, softplus

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
_ACTIVATIONS = {"swish": silu, "silu": silu, "sigmoid": sigmoid}


def fused_qkvzba_split_reshape_cat(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> Parts:
    """Split projections grouped by key head (q, k, v, z of a head, then b, a) into: q, k, v of all heads; z; b; a."""
    group = num_heads_v // num_heads_qk
    sizes = [head_qk, head_qk, group * head_v, group * head_v]
    q, k, v, z = mixed_qkvz.unflatten(-1, (num_heads_qk, sum(sizes))).split(sizes, -1)
    b, a = (part.flatten(1).contiguous() for part in mixed_ba.unflatten(-1, (num_heads_qk, 2 * group)).split(group, -1))
    mixed_qkv = torch.cat([part.flatten(1) for part in (q, k, v)], -1)
    return mixed_qkv, z.flatten(1).contiguous().unflatten(-1, (num_heads_v, head_v)), b, a


def fused_qkvzba_split_reshape_cat_contiguous(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> Parts:
    """Split projections that already have q, k, v, z (and b, a) of all heads side by side, into new tensors."""
    qkv = 2 * num_heads_qk * head_qk + num_heads_v * head_v
    z = mixed_qkvz[:, qkv : qkv + num_heads_v * head_v].contiguous()
    b, a = mixed_ba[:, :num_heads_v].contiguous(), mixed_ba[:, num_heads_v : 2 * num_heads_v].contiguous()
    return mixed_qkvz[:, :qkv].contiguous(), z.view(len(z), num_heads_v, head_v), b, a


def fused_qkv_split_gdn_prefill(
    mixed_qkv: torch.Tensor, num_q_heads: int, num_k_heads: int, num_v_heads: int, head_q: int, head_k: int, head_v: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split [tokens, q + k + v] into contiguous [1, tokens, heads, head_dim] tensors."""
    shapes = ((num_q_heads, head_q), (num_k_heads, head_k), (num_v_heads, head_v))
    parts = mixed_qkv.split([heads * size for heads, size in shapes], -1)
    q, k, v = (part.contiguous().view(1, len(part), *shape) for part, shape in zip(parts, shapes, strict=True))
    return q, k, v


def fused_gdn_gating(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decay ``-exp(A_log) * softplus(a + dt_bias)`` and ``sigmoid(b)``, rounded as ``b`` is; both fp32, [1, tokens, heads]."""
    decay = -A_log.float().exp() * softplus(a.float() + dt_bias.float(), beta, threshold)
    return decay.unsqueeze(0), b.float().sigmoid().to(b.dtype).float().unsqueeze(0)


def rms_norm_gated(
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> torch.Tensor:
    """``norm(x) * activation(z)``, or ``norm(x * activation(z))``; the norm over groups of ``group_size``, an RMSNorm or a LayerNorm."""
    y = x.float()
    gate = None if z is None else _ACTIVATIONS[activation](z.float()).reshape(x.shape)
    if gate is not None and not norm_before_gate:
        y = y * gate
    y = _norm(y.unflatten(-1, (-1, group_size or x.shape[-1])), eps, is_rms_norm).flatten(-2) * weight.float()
    y = y if bias is None else y + bias.float()
    return (y * gate if gate is not None and norm_before_gate else y).to(x.dtype)


def fla_rms_norm_gated(
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str = "swish",
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm(x + residual) * activation(g)``, and the sum where ``prenorm`` asks for it."""
    total = x.float() if residual is None else x.float() + residual.float()
    y = _norm(total, eps, True)
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    y = (y * _ACTIVATIONS[activation](g.float()).reshape(x.shape)).to(x.dtype)
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    return (y, total.to(kept)) if prenorm else y


def _norm(x: torch.Tensor, eps: float, is_rms_norm: bool) -> torch.Tensor:
    x = x if is_rms_norm else x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def fused_qk_gemma_rmsnorm(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm(x) * (1 + weight)`` of each head of q and k, [heads of all tokens, head_dim]."""
    pairs = ((q.reshape(-1, head_dim), q_weight), (k.reshape(-1, head_dim), k_weight))
    q_out, k_out = ((_norm(x.float(), eps, True) * (weight.float() + 1)).to(x.dtype) for x, weight in pairs)
    return q_out, k_out


def fused_qk_gemma_rmsnorm_with_gate(
    q_gate: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_dim: int,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for a q whose heads are each followed by their gate. Also returns the gates."""
    q, gate = q_gate.reshape(-1, num_heads, 2 * head_dim).chunk(2, -1)
    q_out, k_out = fused_qk_gemma_rmsnorm(q, k, q_weight, k_weight, eps, head_dim)
    return q_out, k_out, gate.reshape(-1, head_dim)
