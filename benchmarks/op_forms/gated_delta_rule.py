# SPDX-License-Identifier: Apache-2.0
"""The functions of the gated delta rule, as SGLang's linear attention calls them: with a pool of fp32 states, in place."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from sglang_fl.dispatch.bridge.base import Routes
from sglang_fl.dispatch.bridge.bridges import FUNCTION_BRIDGES
from sglang_fl.dispatch.bridge.function import FunctionBridge
from sglang_fl.dispatch.bridge.gated_delta_rule import GatedDeltaContext
from sglang_fl.dispatch.policy import Overrides
from sglang_fl.dispatch.types import BackendImplKind, OpImpl

from .form import Form, Forms, Tensors, nbytes

#: Heads of Qwen3-Next and Qwen3.5, two of v to one of q; 16 and 32 of them at a hidden size of 2048.
_DIM = 128
_HIDDEN = (1024, 2048, 4096)
#: The most sequences of a decode batch, and the tokens of a sequence of prefill.
_BATCH, _LENGTH = 512, 2048

Prepare = Callable[..., dict[str, Any]]


class Called(nn.Module):
    """A function in a layer's place."""

    def __init__(self, function: Callable[..., Any], prepare: Prepare):
        super().__init__()
        self.function, self.prepare = function, prepare

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(**self.prepare(*tensors))


def _bound(bridge: FunctionBridge, site: GatedDeltaContext, prepare: Prepare, impl: OpImpl) -> nn.Module:
    """What SGLang's caller comes to when the function is bound, the registry's hook aside."""
    if impl.kind is BackendImplKind.REFERENCE and bridge.op != "fused_recurrent_gated_delta_rule_packed_decode" and _captures(site):
        raise NotImplementedError("it reads the sequences' lengths on the host, which no graph can hold")
    bridge.trial(None, site, impl.function)

    def failed(error: Exception, *_: Any) -> Any:
        raise error

    routes = Routes(impl.function, impl.dtypes(), failed, Overrides(), failed, failed)
    return Called(partial(bridge.forward(routes), None), prepare)


def _captures(site: GatedDeltaContext) -> bool:
    return site.device.type != "cpu"


def _form(op: str, site: GatedDeltaContext, inputs: Callable[[int], Tensors], prepare: Prepare, **more: Any) -> Form:
    bridge = next(bridge for bridge in FUNCTION_BRIDGES if bridge.op == op)

    def own() -> nn.Module:
        module = __import__(bridge.module, fromlist=[bridge.name])
        return Called(getattr(module, bridge.name), prepare)

    return Form("", own, inputs, bound=partial(_bound, bridge, site, prepare), **more)


def _site(hidden: int, dtype: torch.dtype, device: torch.device) -> GatedDeltaContext:
    heads = hidden // _DIM
    return GatedDeltaContext(dtype, torch.float32, device, heads, 2 * heads, _DIM, _DIM)


@lru_cache
def _places(tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences' slots and ends; the same tensors for each set of inputs, as for each layer of a forward pass."""
    count = -(-tokens // _LENGTH)
    ends = [min(tokens, n * _LENGTH) for n in range(count + 1)]
    slots = torch.arange(count, dtype=torch.int32, device=device)
    return slots, torch.tensor(ends, dtype=torch.int32, device=device)


def chunk(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    if hidden not in _HIDDEN:
        return
    site = _site(hidden, dtype, device)

    def inputs(tokens: int) -> Tensors:
        q, k = torch.randn(2, 1, tokens, site.heads, _DIM, dtype=dtype, device=device)
        v = torch.randn(1, tokens, site.value_heads, _DIM, dtype=dtype, device=device)
        g, beta = torch.rand(2, 1, tokens, site.value_heads, device=device)
        pool = torch.zeros(-(-tokens // _LENGTH), site.value_heads, _DIM, _DIM, device=device)
        return q, k, v, -g, beta, pool

    def prepare(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, pool: torch.Tensor
    ) -> dict[str, Any]:
        slots, ends = _places(q.shape[1], device)
        states = {"initial_state": pool, "initial_state_indices": slots, "cu_seqlens": ends}
        return {"q": q, "k": k, "v": v, "g": g, "beta": beta, **states, "head_first": False, "use_qk_l2norm_in_kernel": True}

    def moved(tensors: Tensors) -> int:
        _, _, v, _, _, pool = tensors
        return nbytes(*tensors) + nbytes(v, pool)

    yield _form("chunk_gated_delta_rule", site, inputs, prepare, moved=moved, compared=lambda result: (result[0],))


def packed_decode(hidden: int, dtype: torch.dtype, device: torch.device) -> Iterator[Form]:
    if hidden not in _HIDDEN:
        return
    site = _site(hidden, dtype, device)
    constants = torch.randn(2, site.value_heads, device=device)

    def inputs(batch: int) -> Tensors:
        mixed = torch.randn(batch, (2 * site.heads + site.value_heads) * _DIM, dtype=dtype, device=device)
        a, b = torch.randn(2, batch, site.value_heads, dtype=dtype, device=device)
        pool = torch.zeros(batch, site.value_heads, _DIM, _DIM, device=device)
        out = torch.empty(batch, 1, site.value_heads, _DIM, dtype=dtype, device=device)
        return mixed, a, b, pool, out, torch.randperm(batch, device=device).int()

    def prepare(
        mixed: torch.Tensor, a: torch.Tensor, b: torch.Tensor, pool: torch.Tensor, out: torch.Tensor, slots: torch.Tensor
    ) -> dict[str, Any]:
        gates = {"mixed_qkv": mixed, "a": a, "b": b, "A_log": constants[0], "dt_bias": constants[1], "scale": _DIM**-0.5}
        return {**gates, "initial_state": pool, "out": out, "ssm_state_indices": slots, "use_qk_l2norm_in_kernel": True}

    def moved(tensors: Tensors) -> int:
        _, _, _, pool, _, _ = tensors
        return nbytes(*tensors) + nbytes(pool)

    op = "fused_recurrent_gated_delta_rule_packed_decode"
    yield _form(op, site, inputs, prepare, moved=moved, compared=lambda result: (result[0],), most_tokens=_BATCH)


FORMS: dict[str, Forms] = {
    "chunk_gated_delta_rule": chunk,
    "fused_recurrent_gated_delta_rule_packed_decode": packed_decode,
}
