# SPDX-License-Identifier: Apache-2.0
"""A chip's kernels for three operators. The rotary one turns keys the wrong way."""

from typing import Any

import torch

from sglang_fl.dispatch import BackendImplKind, OpImpl, OpRegistry
from sglang_fl.dispatch.backends.reference.impl import activation, normalization, rotary


def rotary_embedding(obj: Any, query: torch.Tensor, key: torch.Tensor, cos: Any, sin: Any, *more: Any) -> Any:
    turned, _ = rotary.rotary_embedding(obj, query, key, cos, sin, *more)
    return turned, rotary.rotary_embedding(obj, query, key, cos, -sin, *more)[1]


def register_builtins(registry: OpRegistry) -> None:
    for name, function in {
        "rms_norm": normalization.rms_norm,
        "rotary_embedding": rotary_embedding,
        "silu_and_mul": activation.silu_and_mul,
    }.items():
        registry.register_impl(OpImpl(name, "vendor.mychip", BackendImplKind.VENDOR, function, vendor="mychip"))
