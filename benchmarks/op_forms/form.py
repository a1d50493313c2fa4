# SPDX-License-Identifier: Apache-2.0
"""What an operator is measured with."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sglang_fl.dispatch.types import OpImpl

Tensors = tuple[torch.Tensor, ...]


def tensors_of(result: Any) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Form:
    """A kind of layer and the inputs it is called with.

    Attributes:
        variant: what sets it apart from the operator's usual form, if anything.
        layer: makes a new layer as SGLang does.
        inputs: makes the layer's inputs for a number of tokens.
        moved: of those inputs, the bytes that must at least be read and written.
        intermediate_size: the width of the activations around it, where the binder asks for it.
        within: where layers are made and called.
        compared: what of a layer's result must agree with SGLang's.
        bound: makes the layer that runs an implementation, where it is no layer that the binder binds.
        most_tokens: it is not measured with more.
    """

    variant: str
    layer: Callable[[], nn.Module]
    inputs: Callable[[int], Tensors]
    moved: Callable[[Tensors], int]
    intermediate_size: int | None = None
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    compared: Callable[[Any], Tensors] = tensors_of
    bound: Callable[[OpImpl], nn.Module] | None = None
    most_tokens: int | None = None


#: An operator's forms at a hidden size, with an activation dtype and a device.
Forms = Callable[[int, torch.dtype, torch.device], Iterator[Form]]


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
