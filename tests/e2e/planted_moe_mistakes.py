# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the reference's routing and experts, loaded through SGLANG_FL_PLUGIN_MODULES.

The reference stays what runs; the file named in PLANTED_MISTAKE says which mistake it makes, and is read at every
call, so that one server shows all of them.
"""

import os
from pathlib import Path
from typing import Any

import torch

from sglang_fl.dispatch import OpRegistry
from sglang_fl.dispatch.backends.moe import fused_moe_by, topk_by
from sglang_fl.dispatch.backends.reference.impl import moe

topk, fused_moe = moe.route, moe.compute


def mistake() -> str:
    return Path(os.environ["PLANTED_MISTAKE"]).read_text()


def wrong_topk(router_logits: torch.Tensor, bias: Any, routing: Any, real: Any) -> tuple[torch.Tensor, torch.Tensor]:
    kind = mistake()
    if kind == "weights not renormalised":
        routing = routing._replace(renormalize=False)
    if kind == "bf16 logits":
        router_logits = router_logits.bfloat16()
    weights, ids = topk(router_logits, bias, routing, real)
    if kind == "the next expert":
        ids = (ids + 1) % router_logits.shape[1]
    if kind == "weights exchanged":
        weights = weights.flip(-1)
    return weights, ids


def wrong_fused_moe(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, *rest: Any) -> torch.Tensor:
    kind = mistake()
    if kind == "halves swapped":
        w13 = torch.cat(w13.chunk(2, 1)[::-1], 1)
    if kind == "weights dropped":
        weights = torch.ones_like(weights)
    if kind == "bf16 experts":
        return fused_moe(x.bfloat16(), w13, w2, weights, *rest).to(x.dtype)
    return fused_moe(x, w13, w2, weights, *rest)


MISTAKES = (
    "weights not renormalised",
    "bf16 logits",
    "the next expert",
    "weights exchanged",
    "halves swapped",
    "weights dropped",
    "bf16 experts",
)


def register_builtins(registry: OpRegistry) -> None:
    moe.topk, moe.fused_moe = topk_by(wrong_topk), fused_moe_by(wrong_fused_moe)
