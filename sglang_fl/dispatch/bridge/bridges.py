# SPDX-License-Identifier: Apache-2.0
"""Every bridge there is. To add one: a file beside this one, and a line here."""

from .causal_conv1d_fn import CausalConv1dFnBridge
from .causal_conv1d_update import CausalConv1dUpdateBridge
from .chunk_gated_delta_rule import ChunkGatedDeltaRuleBridge
from .function import FunctionBridge
from .fused_moe import FusedMoEBridge
from .fused_recurrent_gated_delta_rule_packed_decode import PackedDecodeBridge
from .fused_sigmoid_gating_delta_rule_update import SigmoidGatingUpdateBridge
from .gelu_and_mul import GeluAndMulBridge
from .gemma_rms_norm import Gemma3RMSNormBridge, GemmaRMSNormBridge
from .layer import LayerBridge
from .layer_norm import LayerNormBridge
from .mrotary_embedding import MRotaryEmbeddingBridge
from .new_gelu import NewGELUBridge
from .quick_gelu import QuickGELUBridge
from .relu2 import ReLU2Bridge
from .rms_norm import Gemma4RMSNormBridge, RMSNormBridge, RMSNormWithoutScaleBridge
from .rotary_embedding import RotaryEmbeddingBridge
from .silu_and_mul import SiluAndMulBridge
from .topk import TopKBridge

LAYER_BRIDGES: tuple[LayerBridge, ...] = (
    FusedMoEBridge(),
    GeluAndMulBridge(),
    Gemma3RMSNormBridge(),
    Gemma4RMSNormBridge(),
    GemmaRMSNormBridge(),
    LayerNormBridge(),
    MRotaryEmbeddingBridge(),
    NewGELUBridge(),
    QuickGELUBridge(),
    RMSNormBridge(),
    RMSNormWithoutScaleBridge(),
    ReLU2Bridge(),
    RotaryEmbeddingBridge(),
    SiluAndMulBridge(),
    TopKBridge(),
)
FUNCTION_BRIDGES: tuple[FunctionBridge, ...] = (
    ChunkGatedDeltaRuleBridge(),
    PackedDecodeBridge(),
    SigmoidGatingUpdateBridge(),
    CausalConv1dFnBridge(),
    CausalConv1dUpdateBridge(),
)
