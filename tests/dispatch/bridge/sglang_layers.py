# SPDX-License-Identifier: Apache-2.0
"""One of each of SGLang's layers that the bridges are for, with every option that changes a result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sglang_fl.dispatch.catalog import LAYERS

HEAD, ROTARY, MAX_POSITION, BASE = 64, 64, 256, 10000
HIDDEN = 64
EXPERTS = 8
#: class name -> the operator that its layers are for.
OP_OF = {name: op for op, layers in LAYERS.items() for _, name in layers}


def sglang_class(name: str) -> type[nn.Module]:
    for layers in LAYERS.values():
        for module, class_name in layers:
            if class_name == name:
                found: type[nn.Module] = getattr(import_module(module), name)
                return found
    raise KeyError(name)


def rotary(
    name: str, *more: Any, head: int = HEAD, rotary_dim: int = ROTARY, neox: bool = True, dtype: torch.dtype = torch.float32, **named: Any
) -> nn.Module:
    return sglang_class(name)(head, rotary_dim, MAX_POSITION, BASE, neox, *more, **named, dtype=dtype)


def _beam(dtype: torch.dtype = torch.float32) -> nn.Module:
    theta = {"sliding_attention": {"rope_theta": BASE}}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return sglang_class("BeamRotaryEmbedding")(
            SimpleNamespace(head_dim=HEAD, max_position_embeddings=MAX_POSITION, rope_parameters=theta)
        )
    finally:
        torch.set_default_dtype(before)


#: class name -> a function that makes a layer of it, with an activation dtype.
ROTARY_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "RotaryEmbedding": lambda dtype: rotary("RotaryEmbedding", dtype=dtype),
    "LinearScalingRotaryEmbedding": lambda dtype: rotary("LinearScalingRotaryEmbedding", scaling_factors=[1.0, 4.0], dtype=dtype),
    "DynamicNTKAlphaRotaryEmbedding": lambda dtype: rotary("DynamicNTKAlphaRotaryEmbedding", 2.0, dtype=dtype),
    "DynamicNTKScalingRotaryEmbedding": lambda dtype: rotary("DynamicNTKScalingRotaryEmbedding", 2.0, dtype=dtype),
    "YaRNScalingRotaryEmbedding": lambda dtype: rotary("YaRNScalingRotaryEmbedding", 4.0, dtype=dtype),
    "Llama3RotaryEmbedding": lambda dtype: rotary(
        "Llama3RotaryEmbedding", dtype=dtype, scaling_factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, orig_max_position=64
    ),
    "Gemma4RotaryEmbedding": lambda dtype: rotary("Gemma4RotaryEmbedding", rotary_dim=16, dtype=dtype),
    "BeamRotaryEmbedding": _beam,
    "ScalingRotaryEmbedding": lambda dtype: rotary("ScalingRotaryEmbedding", 4.0, dtype=dtype),
    "DeepseekScalingRotaryEmbedding": lambda dtype: rotary("DeepseekScalingRotaryEmbedding", 4.0, dtype=dtype, device="cpu"),
    "MRotaryEmbedding": lambda dtype: rotary("MRotaryEmbedding", dtype=dtype, mrope_section=[8, 12, 12]),
    "YaRNScalingMRotaryEmbedding": lambda dtype: rotary("YaRNScalingMRotaryEmbedding", 4.0, dtype=dtype, mrope_section=[8, 12, 12]),
    "Ernie4_5_VLRotaryEmbedding": lambda dtype: rotary("Ernie4_5_VLRotaryEmbedding", dtype=dtype, mrope_section=[22, 22, 20]),
    "BailingMRotaryEmbedding": lambda dtype: rotary("BailingMRotaryEmbedding", dtype=dtype, mrope_section=[8, 12, 12]),
    "Llama4VisionRotaryEmbedding": lambda dtype: rotary("Llama4VisionRotaryEmbedding", dtype=dtype),
}

NORM_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "RMSNorm": lambda **options: sglang_class("RMSNorm")(HIDDEN, **options),
    "Gemma3RMSNorm": lambda **options: sglang_class("Gemma3RMSNorm")(HIDDEN, **options),
    "Gemma3nRMSNorm": lambda: sglang_class("Gemma3nRMSNorm")(HIDDEN),
    "Gemma4RMSNorm": lambda **options: sglang_class("Gemma4RMSNorm")(HIDDEN, **options),
    "GemmaRMSNorm": lambda **options: sglang_class("GemmaRMSNorm")(HIDDEN, **options),
    "Glm4vRMSNorm": lambda: sglang_class("Glm4vRMSNorm")(HIDDEN),
    "GlmOcrRMSNorm": lambda: sglang_class("GlmOcrRMSNorm")(HIDDEN),
    "LayerNorm": lambda **options: sglang_class("LayerNorm")(HIDDEN, **options),
    "RMSNormWithoutScale": lambda **options: sglang_class("RMSNormWithoutScale")(HIDDEN, **options),
}

ACTIVATION_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "BeamSiluAndMul": lambda: sglang_class("BeamSiluAndMul")(),
    "GeluAndMul": lambda **options: sglang_class("GeluAndMul")(**options),
    "NewGELU": lambda: sglang_class("NewGELU")(),
    "QuickGELU": lambda: sglang_class("QuickGELU")(),
    "ReLU2": lambda: sglang_class("ReLU2")(),
    "SiluAndMul": lambda: sglang_class("SiluAndMul")(),
}


@contextmanager
def in_a_server(**arguments: Any) -> Iterator[None]:
    """As in the process of a server with these arguments: routers and experts ask it when they are made and called."""
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    context = runtime_context.create_context(ServerArgs(model_path="dummy", **arguments), role="scheduler")
    alone = {f"{kind}_{what}": int(what == "size") for kind in ("moe_ep", "moe_tp", "tp") for what in ("size", "rank")}
    with runtime_context.use_context(context), runtime_context.get_parallel().override(**alone, tp_group=SimpleNamespace(world_size=1)):
        yield


def router(*, bind: bool = True, **options: Any) -> Any:
    """A TopK that belongs to experts, of SGLang's usual runner."""
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    layer = sglang_class("TopK")(**{"top_k": 2, "layer_id": 0, **options})
    if bind:
        layer.bind_runner_backend(MoeRunnerBackend.TRITON)
    return layer


def experts(method: str | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A FusedMoE, whose quant_method is the layer that a bridge is for."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    given = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": 32, "layer_id": 0, "top_k": 2, "params_dtype": dtype}
    layer = FusedMoE(**{**given, **options}, quant_method=sglang_class(method)() if method else None)
    for name, weight in layer.named_parameters():
        torch.nn.init.normal_(weight, std=1.0 if "bias" in name else weight.shape[-1] ** -0.5)
    return layer


MOE_LAYERS: dict[str, Callable[[], Any]] = {
    "TopK": router,
    "UnquantizedFusedMoEMethod": lambda: experts().quant_method,
    "BeamUnquantizedFusedMoEMethod": lambda: experts("BeamUnquantizedFusedMoEMethod").quant_method,
    # Its runner wants an NPU, so that no layer of it can be made here.
    "NPUMXFP8OnlineMoEMethod": lambda: sglang_class("NPUMXFP8OnlineMoEMethod")(),
    # SGLang's layer that has it makes no runner for it and computes for itself.
    "_InklingUnquantizedFusedMoEMethod": lambda: sglang_class("_InklingUnquantizedFusedMoEMethod")(),
}


class Model(nn.Module):
    """A model of some layers, and a parameter that gives it a dtype."""

    def __init__(self, *layers: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.embedding = nn.Parameter(torch.zeros(512, 64, dtype=dtype))
