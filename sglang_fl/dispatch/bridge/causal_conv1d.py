# SPDX-License-Identifier: Apache-2.0
"""The short causal convolution of hybrid models: the functions that SGLang's linear attention and short convolutions call.

SGLang's Mamba layers call them too. A model that has only those keeps SGLang's functions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .base import activation_dtype, device_of
from .gated_delta_rule import HybridBridge, HybridContext

#: The names of the weights ``[dim, width]`` in SGLang's layers.
_WEIGHTS = ("conv_weights", "conv_weight")
PADDING = -1


@dataclass(frozen=True)
class ConvolutionContext(HybridContext):
    """The sizes of a model's convolutions on this rank.

    Attributes:
        dim: the number of channels.
        width: the length of the kernel.
        activation: ``"silu"`` or None.
    """

    dim: int
    width: int
    activation: str | None

    def pool(self) -> torch.Tensor:
        return self.scratch(3, self.dim, self.width - 1).to(self.state_dtype)


class CausalConv1dBridge(HybridBridge):
    """The common part of both functions."""

    def contexts(self, model: nn.Module) -> set[ConvolutionContext]:
        layers = [(layer, weight) for layer in model.modules() for weight in _weights(layer)]
        if not layers:
            return set()
        dtype, device = activation_dtype(model), device_of(model)
        state_dtype = dtype if self._problems() else self._state_dtypes(model).conv
        return {
            ConvolutionContext(dtype, state_dtype, device, len(weight), weight.shape[1], activation_of(getattr(layer, "activation", None)))
            for layer, weight in layers
        }


def _weights(layer: nn.Module) -> Iterable[torch.Tensor]:
    found = (getattr(layer, name, None) for name in _WEIGHTS)
    return (weight for weight in found if isinstance(weight, torch.Tensor) and weight.dim() == 2)


def activation_of(given: Any) -> str | None:
    """Convert SGLang's activation argument to the operators': ``"silu"`` or None. Raises KeyError for an unknown one."""
    return {None: None, False: None, True: "silu", "silu": "silu", "swish": "silu"}[given]
