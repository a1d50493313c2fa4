# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule of hybrid models (Qwen3-Next, Qwen3.5): functions that SGLang's linear attention calls.

SGLang's Triton kernel class for this attention calls them, in prefill and in decode. SGLang has other kernel classes, and
selects FlashInfer's by itself for some sizes on some GPUs. Then these functions are not called, and the log names the class.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import nn

from ...compat import gated_delta_rule_problems, hook
from ..catalog import FUNCTIONS
from ..logger_manager import dispatch_log, get_logger
from .base import ModelContext, activation_dtype, check_result, device_of, scratch
from .function import FunctionBridge

logger = get_logger()

_LINEAR = "sglang.srt.layers.attention.linear"
_CALLER = f"{_LINEAR}.kernels.gdn_triton"
_DISPATCHER = f"{_LINEAR}.gdn_backend.GDNKernelDispatcher.__init__"
_TRITON = "TritonGDNKernel"


@dataclass(frozen=True)
class HybridContext:
    """What a hybrid model calls the functions for: ``state_dtype`` is that of SGLang's pool of states."""

    dtype: torch.dtype
    state_dtype: torch.dtype
    device: torch.device

    def scratch(self, *shape: int) -> torch.Tensor:
        return scratch(ModelContext(self.dtype, self.device), *shape)

    def scratch32(self, *shape: int) -> torch.Tensor:
        return scratch(ModelContext(torch.float32, self.device), *shape)

    def integers(self, *values: int) -> torch.Tensor:
        """Slots, or where sequences begin and end."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class GatedDeltaContext(HybridContext):
    """The sizes of a model's gated-delta-rule layers on this rank."""

    heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    def pool(self, slots: int) -> torch.Tensor:
        return self.scratch32(slots, self.value_heads, self.value_dim, self.key_dim).to(self.state_dtype)


class HybridBridge(FunctionBridge):
    """The common part of all functions of hybrid models."""

    def exclusion_reason(self) -> str | None:
        problems = self._problems()
        return f"SGLang differs from what sglang-fl needs: {'; '.join(problems)}" if problems else None

    def _problems(self) -> list[str]:
        """What differs in SGLang from what this bridge relies on. Differences in the other functions do not count."""
        others = {f"{module}:{name}" for op, (module, name) in FUNCTIONS.items() if op != self.op}
        return [problem for problem in gated_delta_rule_problems() if problem.split(" ")[0] not in others]

    def _state_dtypes(self, model: nn.Module) -> Any:
        """The dtypes of SGLang's pools of states for a model, as attributes ``conv`` and ``temporal``."""
        return import_module("sglang.srt.configs.mamba_utils").mamba2_state_dtype(getattr(model, "config", None))


class GatedDeltaRuleBridge(HybridBridge):
    """The common part of the gated-delta-rule functions."""

    #: The attribute of SGLang's dispatcher with the kernel class that calls the function.
    kernel: ClassVar[str]

    def contexts(self, model: nn.Module) -> set[GatedDeltaContext]:
        attention = getattr(sys.modules.get("sglang.srt.layers.radix_linear_attention"), "RadixLinearAttention", None)
        layers = [layer for layer in model.modules() if attention is not None and isinstance(layer, attention) and _is_gated_delta(layer)]
        if not layers:
            return set()
        state_dtype = torch.float32
        if not self._problems():
            import_module(_CALLER)  # SGLang does so a moment later, when it makes its attention backend
            state_dtype = self._state_dtypes(model).temporal
        dtype, device = activation_dtype(model), device_of(model)
        return {GatedDeltaContext(dtype, state_dtype, device, x.num_k_heads, x.num_v_heads, x.head_k_dim, x.head_v_dim) for x in layers}

    def hooked(self, log_level: int) -> None:
        """Say so if SGLang's dispatcher takes a kernel class that does not call the function."""
        if not _watching:
            hook(_DISPATCHER, _dispatcher_made, "after")
        _watching[self] = log_level


def _is_gated_delta(layer: Any) -> bool:
    """Whether a linear-attention layer has one gate a head. (Kimi's delta attention has one for each number of a key.)"""
    gates = layer.A_log, layer.dt_bias
    return all(isinstance(gate, torch.Tensor) and gate.numel() == layer.num_v_heads for gate in gates)


_watching: dict[GatedDeltaRuleBridge, int] = {}


def _dispatcher_made(result: None, dispatcher: Any, *args: Any, **kwargs: Any) -> None:
    for bridge, log_level in _watching.items():
        chosen = type(getattr(dispatcher, bridge.kernel)).__name__
        if chosen != _TRITON:
            logger.log(
                log_level,
                "sglang-fl: SGLang runs %s, which does not call %s (--linear-attn-backend triton would)",
                chosen,
                bridge.name,
            )
            dispatch_log().record(bridge.name, f"sglang(not called: {chosen} is used)")


def check_tokens(out: Any, like: torch.Tensor, tokens: Any) -> None:
    """As :func:`check_result` for a result like a tensor, of which what belongs to padding may be anything."""
    fits = isinstance(out, torch.Tensor) and out.shape == like.shape
    check_result("the result", out[tokens] if fits else out, like[tokens] if fits else like)


def check_pool(pool: torch.Tensor, before: torch.Tensor, written: list[int]) -> None:
    """Raises ValueError unless these slots, and no others, were written, with finite numbers."""
    if not pool.sum(dtype=torch.float32).isfinite():  # pool.isfinite() would take as much memory as the pool, twice
        raise ValueError("a state contains inf or nan, for inputs between -1 and 1")
    changed = [slot for slot in range(len(pool)) if not torch.equal(pool[slot], before[slot])]
    if changed != written:
        raise ValueError(f"the slots of the sequences are {written}; it wrote {changed}")
