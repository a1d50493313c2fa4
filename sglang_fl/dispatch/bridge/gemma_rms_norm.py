# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch

from .base import OBJ, Forward, Layer, Routes, Site
from .norm import NormBridge, norm_obj


class GemmaRMSNormBridge(NormBridge):
    """SGLang's GemmaRMSNorm: ``forward(x, residual, post_residual_addition)``."""

    op = "gemma_rms_norm"
    with_residual = True
    npu_switch = "SGLANG_NPU_FORWARD_NATIVE_GEMMA_RMS_NORM"

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own = routes.fn, routes.dtypes, routes.own
        contexts, divert, failed = routes.contexts, routes.divert, routes.failed

        def forward(
            self: Layer,
            x: torch.Tensor,
            residual: torch.Tensor | None = None,
            post_residual_addition: torch.Tensor | None = None,
        ) -> Any:
            if post_residual_addition is not None:
                return own(self, x, residual, post_residual_addition)
            if contexts.active:
                return divert(self, x, residual)
            if dtypes is not None and x.dtype not in dtypes:
                return own(self, x, residual)
            try:
                return fn(self, x, residual)
            except Exception as error:
                return failed(self, error, (x, residual), (x, residual))

        return forward


class Gemma3RMSNormBridge(NormBridge):
    """SGLang's Gemma3RMSNorm: ``forward(x, residual)``, and ``eps`` for ``variance_epsilon``."""

    op = "gemma_rms_norm"
    class_name = "Gemma3RMSNorm"
    with_residual = True
    npu_switch = "SGLANG_NPU_FORWARD_NATIVE_GEMMA_RMS_NORM"

    def _obj(self, layer: Layer, site: Site) -> Any:
        return vars(layer).get(OBJ) or norm_obj(layer, site.dtype, site.device)

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own = routes.fn, routes.dtypes, routes.own
        contexts, divert, failed = routes.contexts, routes.divert, routes.failed

        def forward(self: Layer, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            if contexts.active:
                return divert(self, x, residual)
            if dtypes is not None and x.dtype not in dtypes:
                return own(self, x, residual)
            obj = self.__dict__.get(OBJ) or norm_obj(self, x.dtype, x.device)
            try:
                return fn(obj, x, residual)
            except Exception as error:
                return failed(self, error, (x, residual), (x, residual))

        return forward
