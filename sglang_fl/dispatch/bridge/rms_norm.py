# SPDX-License-Identifier: Apache-2.0
import sys
from typing import Any

import torch
from torch import nn

from .base import Bridge, Forward, Layer, Routes, Site, check_result, scratch

_TRIAL_TOKENS = 2
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


class RMSNormBridge(Bridge):
    """SGLang's RMSNorm: ``forward(x, residual, post_residual_addition, quant_linear)``."""

    op = "rms_norm"

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

    def trial_key(self, layer: Layer, site: Site) -> tuple[Any, ...]:
        return site.dtype, site.device, layer.weight.shape, layer.weight.dtype, layer.variance_epsilon

    def trial(self, layer: Layer, site: Site, fn: Forward) -> None:
        x = scratch(site, _TRIAL_TOKENS, layer.weight.shape[0])
        check_result("its result", fn(layer, x.clone()), x)
        with_residual = fn(layer, x.clone(), x.clone())
        if not isinstance(with_residual, tuple) or len(with_residual) != 2:
            raise TypeError(f"with a residual its result is {type(with_residual).__name__}, not (normed, residual)")
        for what, result in zip(("its result", "its residual"), with_residual, strict=True):
            check_result(what, result, x)

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
