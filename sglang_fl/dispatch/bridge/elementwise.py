# SPDX-License-Identifier: Apache-2.0
"""What the bridges of activations without weights share."""

from typing import Any, ClassVar

import torch

from .base import TRIAL_TOKENS, Forward, ModelContext, Routes, check_result, scratch
from .layer import Layer, LayerBridge

_UNKNOWN_SIZE = 128


class ElementwiseBridge(LayerBridge):
    """SGLang's activations without weights: ``forward(x)``."""

    #: Whether x holds two halves, a gate and what it is multiplied with.
    gated: ClassVar[bool] = False

    def trial_key(self, layer: Layer, context: ModelContext) -> tuple[Any, ...]:
        return (context.intermediate_size,)

    def trial(self, layer: Layer, context: ModelContext, fn: Forward) -> None:
        size = context.intermediate_size or _UNKNOWN_SIZE
        x = scratch(context, TRIAL_TOKENS, 2 * size if self.gated else size)
        check_result("its result", fn(layer, x), x, (TRIAL_TOKENS, size))

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own, contexts, divert, failed = routes

        def forward(self: Layer, x: torch.Tensor) -> torch.Tensor:
            if contexts.active:
                return divert(self, x)
            if dtypes is not None and x.dtype not in dtypes:
                return own(self, x)
            try:
                return fn(self, x)
            except Exception as error:
                return failed(self, error, (self, x), (x,))

        return forward
