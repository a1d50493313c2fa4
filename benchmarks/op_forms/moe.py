# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sglang_fl.check.exact import moe as exact
from sglang_fl.dispatch.backends.moe import Routing

from .form import Form, Forms, Tensors, nbytes

#: hidden size -> experts, how many a token goes to, and their intermediate size: those of Qwen3-30B-A3B, and of
#: Qwen3-235B-A22B on each of eight GPUs. At other sizes there are eight large ones, as in Mixtral.
_SHAPES = {2048: (128, 8, 768), 4096: (128, 8, 192)}
_MOST_EXPERTS, _POOL = 256, 64
_GROUPS, _GROUPS_KEPT, _FACTOR = 8, 4, 2.5


@lru_cache(maxsize=1)
def _context() -> Any:
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    return runtime_context.create_context(ServerArgs(model_path="dummy"), role="scheduler")


@contextmanager
def in_a_server() -> Iterator[None]:
    """Routers and experts ask the server's arguments, and its only rank, when they are made and called."""
    from sglang.srt import runtime_context

    alone = {f"{kind}_{what}": int(what == "size") for kind in ("moe_ep", "moe_tp", "tp") for what in ("size", "rank")}
    with runtime_context.use_context(_context()), runtime_context.get_parallel().override(**alone, tp_group=SimpleNamespace(world_size=1)):
        yield


def by_expert(output: Any) -> Tensors:
    """Each token's weights by expert: in which columns they stand is open."""
    weights, ids, logits = output
    return (logits.new_zeros(logits.shape, dtype=torch.float32).scatter_(1, ids.long(), weights),)


def _topk_layer(options: dict[str, Any]) -> nn.Module:
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    layer: nn.Module = TopK(layer_id=0, **options)
    layer.bind_runner_backend(MoeRunnerBackend.TRITON)
    return layer


def topk(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    experts, top_k = min(hidden // 16, _MOST_EXPERTS), 8
    softmax: dict[str, Any] = {"top_k": top_k}
    forms = [("", softmax, Routing(top_k, "softmax", True, 1, 1, 1.0, None))]
    if device.type != "cpu":  # where SGLang would compile its own first
        bias = torch.linspace(-0.1, 0.1, experts, device=device)
        groups = {"use_grouped_topk": True, "num_expert_group": _GROUPS, "topk_group": _GROUPS_KEPT, "scoring_func": "sigmoid"}
        scaled = {"routed_scaling_factor": _FACTOR, "apply_routed_scaling_factor_on_output": True}
        routing = Routing(top_k, "sigmoid", True, _GROUPS, _GROUPS_KEPT, _FACTOR, None)
        forms += [("sigmoid, groups", {**softmax, **groups, **scaled, "correction_bias": bias}, routing)]

    def inputs(pool: torch.Tensor, tokens: int) -> Tensors:
        rows = torch.randint(len(pool), (tokens,), device=device)
        return torch.randn(tokens, hidden, dtype=dtype, device=device), pool[rows]

    def moved(tensors: Tensors) -> int:
        return nbytes(tensors[1]) + len(tensors[1]) * top_k * 8

    for variant, options, routing in forms:
        # Of tokens whose experts rounding cannot exchange: any number of them makes a batch.
        drawn = (torch.rand(8 * _POOL, experts).argsort(-1) - experts // 2) / 32
        bias = options.get("correction_bias")
        pool = drawn[exact.topk(drawn, bias, routing)[0].gap > 1e-4][:_POOL].to(device, dtype)
        yield Form(variant, partial(_topk_layer, options), partial(inputs, pool), moved, within=in_a_server, compared=by_expert)


class Experts(nn.Module):
    """A FusedMoE's experts, called as it calls them."""

    def __init__(self, experts: int, top_k: int, hidden: int, size: int, dtype: torch.dtype, device: torch.device):
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        super().__init__()
        with device:
            self.experts = FusedMoE(experts, hidden, size, layer_id=0, top_k=top_k, params_dtype=dtype, inplace=False)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        given = StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, x))
        found: torch.Tensor = self.experts.quant_method.apply(self.experts, given).hidden_states
        return found


def fused_moe(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    experts, top_k, size = _SHAPES.get(hidden, (8, 2, hidden // 2))

    def layer() -> nn.Module:
        torch.manual_seed(0)  # every layer has the same weights
        return Experts(experts, top_k, hidden, size, dtype, device)

    def inputs(tokens: int) -> Tensors:
        ids = torch.rand(tokens, experts, device=device).argsort(-1)[:, :top_k]
        weights = torch.rand(tokens, top_k, device=device) + 0.1
        x = torch.randn(tokens, hidden, dtype=dtype, device=device)
        return x, weights / weights.sum(-1, keepdim=True), ids.to(torch.int32)

    def moved(tensors: Tensors) -> int:
        x, weights, ids = tensors
        return 2 * nbytes(x) + nbytes(weights, ids) + ids.unique().numel() * 3 * hidden * size * dtype.itemsize

    yield Form("", layer, inputs, moved, within=in_a_server)


FORMS: dict[str, Forms] = {"fused_moe": fused_moe, "topk": topk}
