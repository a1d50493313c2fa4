# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..exact import normalization as exact
from ..exact.judge import Exact
from .call import Call, Draw, Form, Layer, Operator, each
from .models import numbers

#: The squares of larger numbers overflow fp32, the dtype of the arithmetic.
_LARGEST = 1e17


@dataclass(frozen=True)
class Norm(Form):
    """A call of a norm.

    Attributes:
        heads: if not 0, heads of ``hidden`` numbers each, as in the norms of q and k.
        shape: the shape of x, instead of tokens, heads and hidden.
        scale, offset: applied to x.
        weights: their dtype. Empty: that of x.
        residual_apart: the residual is contiguous, whatever x's layout.
        weights_apart: the weights are strided, with other numbers between them.
        biased: the layer has a bias.
    """

    hidden: int = 256
    heads: int = 0
    shape: tuple[int, ...] = ()
    residual: bool = False
    residual_apart: bool = False
    eps: float = 1e-6
    scale: float = 3.0
    offset: float = 0.0
    weights: str = ""
    weights_apart: bool = False
    biased: bool = False

    def call(self, draw: Draw) -> Call:
        shape = self.shape or (self.tokens, max(1, self.heads) * self.hidden)
        x = self._laid_out(draw, draw.normal(*shape, scale=self.scale, offset=self.offset), self.layout)
        dtype = getattr(torch, self.weights) if self.weights else draw.dtype
        weight, bias = (draw.normal(x.shape[-1], 2 if self.weights_apart else 1, dtype=dtype)[:, 0] for _ in range(2))
        layer = Layer(weight, self.eps, bias if self.biased else None)
        if not self.residual:
            return Call(layer, {"x": x})
        layout = "" if self.residual_apart else self.layout
        residual = self._laid_out(draw, draw.normal(*shape, scale=self.scale * 10 / 3), layout, sign=-1)
        return Call(layer, {"x": x, "residual": residual}, frozenset({"x", "residual"}))

    def _laid_out(self, draw: Draw, x: torch.Tensor, layout: str, sign: int = 1) -> torch.Tensor:
        if self.values:
            x = draw.place(sign * draw.extreme(self.values, *x.shape, largest=_LARGEST))
        x = draw.laid_out(x, layout)
        return x.unflatten(1, (self.heads, self.hidden)) if self.heads else x


_UNUSUAL = """
shape=0,128 | shape=2,0,64 | shape=3,1 | shape=5,33 | shape=33,80 | shape=3,5000 | shape=3,16384 | shape=4,7,512 | shape=128
| shape=2,3,4,32 | weights={float32,bfloat16,float16} | shape=6,5,64 layout=view | tokens=14 layout=every-other
| shape=9,5,64 layout=turned | tokens=9 heads=4 hidden=64 layout=view | tokens=9 hidden=64 layout={odd-view,transposed}
"""
#: Calls where epsilon dominates, and where the mean does.
_CONSTANTS = "scale=0.1 eps={1e-5,1e-2,0.0} | scale=1e-3 eps={1e-6,1e-5} | offset=100 | hidden=64 weights_apart"
_SIZES = f"""
tokens=3 hidden={{{numbers("hidden", "q_lora", "kv_lora")}}} | tokens=3 heads={{1,2,5,8,16,40,128}} hidden=128
| tokens=3 heads=7 hidden={{{numbers("head_dim")},72,112}} | tokens=3 layout=far
"""
_MANY = "tokens={1025,4097,65537} hidden=16 | tokens=4097 hidden=17 | tokens=2048 heads=33 hidden=16 layout=view"
_VAST = "tokens=8192 heads=32 hidden=128 | tokens=2097153 hidden=1024"
#: For operators that take a residual.
_APART, _VAST_RESIDUAL = "tokens=9 hidden=64 layout={view,every-other} residual residual_apart", "tokens=65537 hidden=1024 residual"


def _operator(exactly: Callable[..., tuple[Exact, ...]], form: Norm, residual: str) -> Operator:
    """``residual``: a word for calls with a residual, if the operator has one."""
    return Operator(
        form,
        f"hidden=4096 {residual}",
        exactly,
        sizes=each(_SIZES, residual),
        many=each(_MANY, residual),
        vast=f"{_VAST} | {_VAST_RESIDUAL}" if residual else _VAST,
        unusual=each(f"{_UNUSUAL} | {_CONSTANTS}", residual) + (f" | {_APART}" if residual else ""),
        special=each("tokens=6 hidden=64 values={nan,largest,zeros,denormals}", residual),
        tokens_in={"x": 0, "residual": 0},
    )


OPERATORS = {
    "gemma_rms_norm": _operator(exact.gemma_rms_norm, Norm(), "{,residual}"),
    # SGLang creates LayerNorm's weights in fp32 for models of any dtype.
    "layer_norm": _operator(exact.layer_norm, Norm(biased=True, weights="float32"), ""),
    "rms_norm": _operator(exact.rms_norm, Norm(), "{,residual}"),
}
