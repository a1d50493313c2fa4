# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule of hybrid models (Qwen3-Next, Qwen3.5): functions that SGLang's linear attention calls.

They are called by SGLang's Triton kernel class for this attention, in prefill and in decode. SGLang has other kernel
classes, and takes FlashInfer's by itself for some sizes on some GPUs; then these functions are not called, and the log
says so. What drafts' verification calls (``fused_sigmoid_gating_delta_rule_update``) is another function, and stays.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import nn

from ...compat import check_gated_delta_rule, hook
from ..logger_manager import dispatch_log, get_logger
from .base import Forward, activation_dtype, check_result, device_of, scratch
from .base import Site as ScratchSite
from .function import FunctionBridge, FunctionRoutes

logger = get_logger()

_LINEAR = "sglang.srt.layers.attention.linear"
_CALLER = f"{_LINEAR}.kernels.gdn_triton"
_DISPATCHER = f"{_LINEAR}.gdn_backend.GDNKernelDispatcher.__init__"
_TRITON = "TritonGDNKernel"


@dataclass(frozen=True)
class GatedDeltaSite:
    """The sizes of a model's gated-delta-rule layers on this rank."""

    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    device: torch.device

    def scratch(self, *shape: int) -> torch.Tensor:
        return scratch(ScratchSite(self.dtype, self.device), *shape)

    def scratch32(self, *shape: int) -> torch.Tensor:
        return scratch(ScratchSite(torch.float32, self.device), *shape)

    def pool(self, slots: int) -> torch.Tensor:
        return self.scratch32(slots, self.value_heads, self.value_dim, self.key_dim).to(self.state_dtype)


class GatedDeltaRuleBridge(FunctionBridge):
    """What the three functions have in common."""

    #: The attribute of SGLang's dispatcher with the kernel class that calls the function.
    kernel: ClassVar[str | None] = None

    def sites(self, model: nn.Module) -> set[GatedDeltaSite]:
        attention = getattr(sys.modules.get("sglang.srt.layers.radix_linear_attention"), "RadixLinearAttention", None)
        layers = [layer for layer in model.modules() if attention is not None and isinstance(layer, attention) and _is_gated_delta(layer)]
        if not layers:
            return set()
        check_gated_delta_rule()
        import_module(_CALLER)  # SGLang does so a moment later, when it makes its attention backend
        state_dtype = import_module("sglang.srt.configs.mamba_utils").mamba2_state_dtype(getattr(model, "config", None)).temporal
        dtype, device = activation_dtype(model), device_of(model)
        return {GatedDeltaSite(x.num_k_heads, x.num_v_heads, x.head_k_dim, x.head_v_dim, dtype, state_dtype, device) for x in layers}

    def hooked(self, log_level: int) -> None:
        if self.kernel is not None:
            _watch_dispatcher(self, log_level)


def _is_gated_delta(layer: Any) -> bool:
    """Whether a linear-attention layer has one gate a head. (Kimi's delta attention has one for each number of a key.)"""
    gates = layer.A_log, layer.dt_bias
    return all(isinstance(gate, torch.Tensor) and gate.numel() == layer.num_v_heads for gate in gates)


_watching: dict[GatedDeltaRuleBridge, int] = {}


def _watch_dispatcher(bridge: GatedDeltaRuleBridge, log_level: int) -> None:
    """Say so if SGLang's dispatcher takes a kernel class that does not call the function."""
    if not _watching:
        hook(_DISPATCHER, _dispatcher_made, "after")
    _watching[bridge] = log_level


def _dispatcher_made(result: None, dispatcher: Any, *args: Any, **kwargs: Any) -> None:
    for bridge, log_level in _watching.items():
        chosen = type(getattr(dispatcher, bridge.kernel or "")).__name__
        if chosen != _TRITON:
            logger.log(
                log_level,
                "sglang-fl: SGLang runs %s, which does not call %s (--linear-attn-backend triton would)",
                chosen,
                bridge.name,
            )
            dispatch_log().record(bridge.name, f"sglang(not called: {chosen} does its work)")


class ChunkGatedDeltaRuleBridge(GatedDeltaRuleBridge):
    """Prefill."""

    op = "chunk_gated_delta_rule"
    kernel = "extend_kernel"

    def trial(self, site: GatedDeltaSite, fn: Forward) -> None:
        """Three sequences, one of more than a chunk, one without a slot."""
        tokens, heads, value_heads = 69, site.heads, site.value_heads
        q, v = site.scratch(1, tokens, heads, site.key_dim), site.scratch(1, tokens, value_heads, site.value_dim)
        gate = site.scratch32(1, tokens, value_heads).abs()
        slots, ends = (torch.tensor(x, dtype=torch.int32, device=site.device) for x in ([2, 0, -1], [0, 66, 68, tokens]))
        pool = site.pool(3)
        result = fn(q, q.flip(1), v, -gate, 1 - gate / 2, None, pool, slots, ends, True, True)
        out, chunks = _pair(result, "(o, chunk states)")
        check_result("o", out, v)
        check_result("the chunk states", chunks, q, (1, 4, *pool.shape[1:]))
        _check_pool(pool, site.pool(3), written=[0, 2])

    def forward(self, routes: FunctionRoutes) -> Forward:
        fn, dtypes, own = routes.fn, routes.dtypes, routes.own
        contexts, divert, failed = routes.contexts, routes.divert, routes.failed

        def forward(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            g: torch.Tensor,
            beta: torch.Tensor,
            scale: float | None = None,
            initial_state: torch.Tensor | None = None,
            initial_state_indices: torch.Tensor | None = None,
            cu_seqlens: torch.Tensor | None = None,
            head_first: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            inplace_update: bool = True,
        ) -> Any:
            states = initial_state, initial_state_indices, cu_seqlens
            sglang_args = (q, k, v, g, beta, scale, *states, head_first, use_qk_l2norm_in_kernel, inplace_update)
            if contexts.active:
                return divert(*sglang_args)
            if head_first or (dtypes is not None and q.dtype not in dtypes):
                return own(*sglang_args)
            args = (q, k, v, g, beta, scale, *states, use_qk_l2norm_in_kernel, inplace_update)
            try:
                out, chunks = fn(*args)
            except Exception as error:
                out, chunks = failed(error, args, lambda: own(*sglang_args)[::2])
            return out, None, chunks

        return _not_compiled(forward)


class FusedRecurrentGatedDeltaRuleBridge(GatedDeltaRuleBridge):
    """Token after token. Nothing in SGLang 0.5.23 calls it; a model from elsewhere may."""

    op = "fused_recurrent_gated_delta_rule"

    def trial(self, site: GatedDeltaSite, fn: Forward) -> None:
        tokens, heads, value_heads = 5, site.heads, site.value_heads
        q, v = site.scratch(1, tokens, heads, site.key_dim), site.scratch(1, tokens, value_heads, site.value_dim)
        gate = site.scratch32(1, tokens, value_heads).abs()
        ends = torch.tensor([0, 4, tokens], dtype=torch.int32, device=site.device)
        states = site.scratch32(2, value_heads, site.value_dim, site.key_dim)
        out, last = _pair(fn(q, q.flip(1), v, -gate, 1 - gate / 2, None, states, True, ends, True), "(o, last states)")
        check_result("o", out, v)
        check_result("the last states", last, states)

    def forward(self, routes: FunctionRoutes) -> Forward:
        fn, dtypes, own = routes.fn, routes.dtypes, routes.own
        contexts, divert, failed = routes.contexts, routes.divert, routes.failed

        def forward(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            g: torch.Tensor,
            beta: torch.Tensor | None = None,
            scale: float | None = None,
            initial_state: torch.Tensor | None = None,
            output_final_state: bool = False,
            cu_seqlens: torch.Tensor | None = None,
            use_qk_l2norm_in_kernel: bool = False,
        ) -> Any:
            args = (q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel)
            if contexts.active:
                return divert(*args)
            # SGLang's takes a beta for each number of v, too.
            if (beta is not None and beta.dim() == v.dim()) or (dtypes is not None and q.dtype not in dtypes):
                return own(*args)
            try:
                return fn(*args)
            except Exception as error:
                return failed(error, args, lambda: own(*args))

        return forward


class PackedDecodeBridge(GatedDeltaRuleBridge):
    """Decode."""

    op = "fused_recurrent_gated_delta_rule_packed_decode"
    kernel = "decode_kernel"

    def trial(self, site: GatedDeltaSite, fn: Forward) -> None:
        """Three sequences, one without a slot."""
        value_heads, value_dim = site.value_heads, site.value_dim
        mixed = site.scratch(3, 2 * site.heads * site.key_dim + value_heads * value_dim)
        gate, constants = site.scratch(3, value_heads), site.scratch32(value_heads)
        slots = torch.tensor([2, -1, 0], dtype=torch.int32, device=site.device)
        pool, out = site.pool(3), site.scratch(3, 1, value_heads, value_dim)
        result = fn(mixed, gate, -gate, constants, -constants, site.key_dim**-0.5, pool, out, slots, True)
        for what, got, wanted in zip(("out", "the pool"), _pair(result, "(out, initial_state)"), (out, pool), strict=True):
            if got is not wanted:
                raise ValueError(f"its result is not {what} that it was given")
        check_result("out", out, out)
        if out[1].any():
            raise ValueError("out is not zero for a sequence that is padding")
        _check_pool(pool, site.pool(3), written=[0, 2])

    def forward(self, routes: FunctionRoutes) -> Forward:
        fn, dtypes, own = routes.fn, routes.dtypes, routes.own
        contexts, divert, failed = routes.contexts, routes.divert, routes.failed

        def forward(
            mixed_qkv: torch.Tensor,
            a: torch.Tensor,
            b: torch.Tensor,
            A_log: torch.Tensor,
            dt_bias: torch.Tensor,
            scale: float,
            initial_state: torch.Tensor,
            out: torch.Tensor,
            ssm_state_indices: torch.Tensor,
            use_qk_l2norm_in_kernel: bool = False,
        ) -> Any:
            args = (mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel)
            if contexts.active:
                return divert(*args)
            if dtypes is not None and mixed_qkv.dtype not in dtypes:
                return own(*args)
            try:
                return fn(*args)
            except Exception as error:
                return failed(error, args, lambda: own(*args))

        return forward


GATED_DELTA_RULE = (ChunkGatedDeltaRuleBridge(), FusedRecurrentGatedDeltaRuleBridge(), PackedDecodeBridge())


def _pair(result: Any, wanted: str) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"its result is {type(result).__name__}, not {wanted}")
    return result


def _check_pool(pool: torch.Tensor, before: torch.Tensor, written: list[int]) -> None:
    """Raises ValueError unless these slots, and no others, were written, with finite numbers."""
    if not pool.isfinite().all():
        raise ValueError("a state holds inf or nan, for inputs between -1 and 1")
    changed = [slot for slot in range(len(pool)) if not torch.equal(pool[slot], before[slot])]
    if changed != written:
        raise ValueError(f"the slots of the sequences are {written}; it wrote {changed}")


def _not_compiled(forward: Forward) -> Forward:
    """As SGLang's own function is, a forward that torch.compile runs as it is."""
    disable: Callable[[Forward], Forward] = torch.compiler.disable
    return disable(forward)
