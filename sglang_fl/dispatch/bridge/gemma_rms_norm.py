# SPDX-License-Identifier: Apache-2.0
from .norm import NormBridge


class GemmaRMSNormBridge(NormBridge):
    """SGLang's GemmaRMSNorm: ``forward(x, residual, post_residual_addition)``."""

    op = "gemma_rms_norm"
    with_residual = True
    npu_switch = "SGLANG_NPU_FORWARD_NATIVE_GEMMA_RMS_NORM"


class Gemma3RMSNormBridge(GemmaRMSNormBridge):
    """SGLang's Gemma3RMSNorm: ``forward(x, residual)``, and ``eps`` for ``variance_epsilon``."""

    class_name = "Gemma3RMSNorm"
    has_eps = True
