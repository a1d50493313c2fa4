# SPDX-License-Identifier: Apache-2.0
import torch

from .base import Forward, Routes, first_difference
from .layer import Layer
from .norm import NormBridge


class LayerNormBridge(NormBridge):
    """SGLang's LayerNorm: ``forward(x)``. It works in ``layer.dtype``, which is fp32 or that of its weights."""

    op = "layer_norm"

    def attribute_reason(self, layer: Layer) -> str | None:
        return first_difference(layer, {"elementwise_affine": True, "use_bias": True})

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own, contexts, divert, failed = routes

        def forward(self: Layer, x: torch.Tensor) -> torch.Tensor:
            if contexts.active:
                return divert(self, x)
            working = self.__dict__["dtype"]
            if working is not torch.float32 and working is not x.dtype:
                # SGLang rounds x to the layer's dtype first.
                return own(self, x)
            if dtypes is not None and x.dtype not in dtypes:
                return own(self, x)
            try:
                return fn(self, x)
            except Exception as error:
                return failed(self, error, (self, x), (x,))

        return forward
