# SPDX-License-Identifier: Apache-2.0
import sys
from typing import Any

import torch
from torch import nn

from .base import OBJ, Forward, Layer, Routes, Site
from .norm import NormBridge, norm_obj

#: Attributes of SGLang's RMSNorm that change its result, and the value that does not.
_STANDARD = {
    "variance_size_override": None,
    "cast_x_before_out_mul": False,
    "fp32_residual": False,
    "override_orig_dtype": None,
}


def _fuses_fp8(layer: Layer) -> bool:
    """Whether SGLang would quantise this norm's output to FP8 on the way out.

    Every norm of Llama and Qwen2 carries ``_quant_linear``; it acts where that linear has a static
    per-tensor scale, which is SGLang's to decide.
    """
    linear = getattr(layer, "_quant_linear", None)
    if linear is None:
        return False
    scale_of = sys.modules["sglang.srt.layers.layernorm"]._fp8_static_input_scale
    return scale_of(linear) is not None


class RMSNormBridge(NormBridge):
    """SGLang's RMSNorm: ``forward(x, residual, post_residual_addition, quant_linear)``."""

    op = "rms_norm"
    with_residual = True

    def _reason_in_attributes(self, layer: Layer) -> str | None:
        for name, standard in _STANDARD.items():
            value = getattr(layer, name)
            if value != standard:
                return f"{name}={value}"
        if getattr(layer, "x_pad_to_multiple", 0):
            return f"x_pad_to_multiple={layer.x_pad_to_multiple}"
        if _fuses_fp8(layer):
            return "its output is quantised to FP8 on the way out"
        return None

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own = routes.fn, routes.dtypes, routes.own
        contexts, divert, failed = routes.contexts, routes.divert, routes.failed

        def forward(
            self: Layer,
            x: torch.Tensor,
            residual: torch.Tensor | None = None,
            post_residual_addition: torch.Tensor | None = None,
            quant_linear: nn.Module | None = None,
        ) -> Any:
            if post_residual_addition is not None or quant_linear is not None:
                return own(self, x, residual, post_residual_addition, quant_linear)
            if contexts.active:
                return divert(self, x, residual)
            if dtypes is not None and x.dtype not in dtypes:
                return own(self, x, residual)
            try:
                return fn(self, x, residual)
            except Exception as error:
                return failed(self, error, (x, residual), (x, residual))

        return forward


class RMSNormWithoutScaleBridge(NormBridge):
    """SGLang's RMSNormWithoutScale: ``forward(x)``, ``eps`` for ``variance_epsilon``, and ones for weights."""

    op = "rms_norm"
    class_name = "RMSNormWithoutScale"

    def _obj(self, layer: Layer, site: Site) -> Any:
        return vars(layer).get(OBJ) or norm_obj(layer, site.dtype, site.device)

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own = routes.fn, routes.dtypes, routes.own
        contexts, divert, failed = routes.contexts, routes.divert, routes.failed

        def forward(self: Layer, x: torch.Tensor) -> Any:
            if contexts.active:
                return divert(self, x)
            if dtypes is not None and x.dtype not in dtypes:
                return own(self, x)
            obj = self.__dict__.get(OBJ) or norm_obj(self, x.dtype, x.device)
            try:
                return fn(obj, x)
            except Exception as error:
                return failed(self, error, (x,), (x,))

        return forward


class Gemma4RMSNormBridge(RMSNormWithoutScaleBridge):
    """SGLang's Gemma4RMSNorm: ``forward(x)`` with plain weights, or with a buffer of ones for them."""

    class_name = "Gemma4RMSNorm"

    def _reason_in_attributes(self, layer: Layer) -> str | None:
        return f"scale_shift={layer.scale_shift}" if layer.with_scale and layer.scale_shift != 0 else None
