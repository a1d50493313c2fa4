# SPDX-License-Identifier: Apache-2.0
import sys

from .base import first_difference
from .layer import Layer
from .norm import NormBridge

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

    def attribute_reason(self, layer: Layer) -> str | None:
        if difference := first_difference(layer, _STANDARD):
            return difference
        if getattr(layer, "x_pad_to_multiple", 0):
            return f"x_pad_to_multiple={layer.x_pad_to_multiple}"
        if _fuses_fp8(layer):
            return "SGLang quantises its output to FP8"
        return None


class RMSNormWithoutScaleBridge(NormBridge):
    """SGLang's RMSNormWithoutScale: ``forward(x)``, ``eps`` for ``variance_epsilon``, and ones for weights."""

    op = "rms_norm"
    class_name = "RMSNormWithoutScale"
    has_eps = True


class Gemma4RMSNormBridge(RMSNormWithoutScaleBridge):
    """SGLang's Gemma4RMSNorm: ``forward(x)`` with plain weights, or with a buffer of ones for them."""

    class_name = "Gemma4RMSNorm"

    def attribute_reason(self, layer: Layer) -> str | None:
        return f"scale_shift={layer.scale_shift}" if layer.with_scale and layer.scale_shift != 0 else None
