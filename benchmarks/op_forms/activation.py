# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from functools import partial

import torch

from .form import Form, Forms, Tensors, nbytes

#: operator -> SGLang's class, 2 if it takes a gate and what that is multiplied with, and its arguments in each variant.
_CLASSES: dict[str, tuple[str, int, dict[str, tuple[str, ...]]]] = {
    "silu_and_mul": ("SiluAndMul", 2, {"": ()}),
    "gelu_and_mul": ("GeluAndMul", 2, {"": ("tanh",), "none": ("none",)}),
    "new_gelu": ("NewGELU", 1, {"": ()}),
    "quick_gelu": ("QuickGELU", 1, {"": ()}),
    "relu2": ("ReLU2", 1, {"": ()}),
}


def _forms(op: str, hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    """Of an activation in an MLP."""
    from sglang.srt.layers import activation

    name, halves, variants = _CLASSES[op]
    # Gated MLPs are about as wide as three times the hidden size, others four times.
    size = (3 if halves == 2 else 4) * hidden

    def inputs(tokens: int) -> Tensors:
        return (torch.randn(tokens, halves * size, dtype=dtype, device=device),)

    for variant, arguments in variants.items():
        layer = partial(getattr(activation, name), *arguments)
        yield Form(variant, layer, inputs, lambda tensors: nbytes(*tensors) * (halves + 1) // halves, size)


FORMS: dict[str, Forms] = {op: partial(_forms, op) for op in _CLASSES}
