# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from .form import Form, Forms, Tensors, nbytes


def _form(
    hidden: int, dtype: torch.dtype, device: torch.device, layer: Callable[[], nn.Module], variant: str = "", halves: int = 2
) -> Form:
    """Of an activation in an MLP; ``halves`` is 2 where it takes a gate and what that is multiplied with."""
    # Gated MLPs are about as wide as three times the hidden size, others four times.
    size = (3 if halves == 2 else 4) * hidden

    def inputs(tokens: int) -> Tensors:
        return (torch.randn(tokens, halves * size, dtype=dtype, device=device),)

    return Form(variant, layer, inputs, lambda tensors: nbytes(*tensors) * (halves + 1) // halves, size)


def gelu_and_mul(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.activation import GeluAndMul

    for variant, approximate in (("", "tanh"), ("none", "none")):
        yield _form(hidden, dtype, device, partial(GeluAndMul, approximate), variant)


def new_gelu(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.activation import NewGELU

    yield _form(hidden, dtype, device, NewGELU, halves=1)


def quick_gelu(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.activation import QuickGELU

    yield _form(hidden, dtype, device, QuickGELU, halves=1)


def relu2(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.activation import ReLU2

    yield _form(hidden, dtype, device, ReLU2, halves=1)


def silu_and_mul(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    from sglang.srt.layers.activation import SiluAndMul

    yield _form(hidden, dtype, device, SiluAndMul)


FORMS: dict[str, Forms] = {
    "silu_and_mul": silu_and_mul,
    "gelu_and_mul": gelu_and_mul,
    "new_gelu": new_gelu,
    "quick_gelu": quick_gelu,
    "relu2": relu2,
}
