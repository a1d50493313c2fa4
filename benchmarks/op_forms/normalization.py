# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from .form import Form, Forms, Tensors, nbytes


def _forms(
    hidden: int, dtype: torch.dtype, device: torch.device, layer: Callable[[], nn.Module], weights: int, variants: tuple[str, ...]
) -> Iterator[Form]:
    """With a variant for each number of inputs; ``weights`` are the bytes that the layer's take."""

    def inputs(count: int, tokens: int) -> Tensors:
        return tuple(torch.randn(tokens, hidden, dtype=dtype, device=device) for _ in range(count))

    for count, variant in enumerate(variants, start=1):
        yield Form(variant, layer, partial(inputs, count), lambda tensors: 2 * nbytes(*tensors) + weights)


def gemma_rms_norm(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.layernorm import GemmaRMSNorm

    def layer() -> nn.Module:
        return GemmaRMSNorm(hidden).to(dtype)

    yield from _forms(hidden, dtype, device, layer, hidden * dtype.itemsize, ("", "residual"))


def layer_norm(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.layernorm import LayerNorm

    # Its weights and arithmetic are fp32 by default.
    yield from _forms(hidden, dtype, device, partial(LayerNorm, hidden), 2 * hidden * 4, ("",))


def rms_norm(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.layernorm import RMSNorm

    layer = partial(RMSNorm, hidden, weight_dtype=dtype)
    yield from _forms(hidden, dtype, device, layer, hidden * dtype.itemsize, ("", "residual"))


FORMS: dict[str, Forms] = {"rms_norm": rms_norm, "gemma_rms_norm": gemma_rms_norm, "layer_norm": layer_norm}
