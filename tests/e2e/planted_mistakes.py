# SPDX-License-Identifier: Apache-2.0
"""A backend that can be wrong on demand, loaded through SGLANG_FL_PLUGIN_MODULES.

The file named in PLANTED_MISTAKE says which mistake to make; it is read at every call, so that one
server shows all of them.
"""

import os
from pathlib import Path
from typing import Any

import torch

from sglang_fl.dispatch import BackendImplKind, OpImpl, OpRegistry
from sglang_fl.dispatch.backends.reference.impl import activation, normalization, rotary


def mistake() -> str:
    return Path(os.environ["PLANTED_MISTAKE"]).read_text()


class WithEps:
    def __init__(self, layer: Any, eps: float):
        self.weight, self.variance_epsilon = layer.weight, eps


def rms_norm(obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    kind = mistake()
    if kind == "eps":
        return normalization.rms_norm(WithEps(obj, 1e-3), x, residual)
    if kind == "residual dropped" and residual is not None:
        return normalization.rms_norm(obj, x), residual
    if kind == "bf16 accumulation":
        hidden = x if residual is None else x + residual
        mean = hidden.bfloat16().square().mean(-1, keepdim=True).float()
        normed = hidden * torch.rsqrt(mean + obj.variance_epsilon) * obj.weight
        return normed if residual is None else (normed, hidden)
    return normalization.rms_norm(obj, x, residual)


def rotary_embedding(
    obj: Any, query: Any, key: Any, cos: Any, sin: Any, position_ids: Any, rotary_interleaved: bool = False, inplace: bool = True
) -> Any:
    layout = not rotary_interleaved if mistake() == "rotary layout" else rotary_interleaved
    return rotary.rotary_embedding(obj, query, key, cos, sin, position_ids, layout, inplace)


def silu_and_mul(obj: Any, x: torch.Tensor) -> torch.Tensor:
    return activation.silu_and_mul(obj, torch.cat(x.chunk(2, -1)[::-1], -1) if mistake() == "halves swapped" else x)


MISTAKES = ("eps", "residual dropped", "bf16 accumulation", "rotary layout", "halves swapped")


def register_builtins(registry: OpRegistry) -> None:
    for fn in (rms_norm, rotary_embedding, silu_and_mul):
        registry.register_impl(OpImpl(fn.__name__, "vendor.planted", BackendImplKind.VENDOR, fn, vendor="planted"))
