# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..exact import activation as exact
from ..exact.judge import Exact
from .call import Call, Draw, Form, Layer, Operator, each
from .models import numbers


@dataclass(frozen=True)
class Activation(Form):
    """A call of an activation.

    Attributes:
        width: the width of the result.
        shape: the shape of x, instead of tokens and width.
        gated: x holds the gate and the factor.
        nan: nan must give nan.
        approximate: the layer's attribute.
    """

    tokens: int = 5
    width: int = 64
    shape: tuple[int, ...] = ()
    gated: bool = True
    nan: bool = True
    approximate: str = "none"

    def call(self, draw: Draw) -> Call:
        shape = self.shape or (self.tokens, 2 * self.width if self.gated else self.width)
        x = self._extreme(draw, shape) if self.values else draw.normal(*shape, scale=4)
        return Call(Layer(approximate=self.approximate), {"x": draw.laid_out(x, self.layout)})

    def _extreme(self, draw: Draw, shape: tuple[int, ...]) -> torch.Tensor:
        x = draw.extreme(self.values, *shape)
        if self.values == "nan":
            x[:, : self.width].abs_()  # a gate of -inf may give either of two results
            x[3:, -1] = -torch.inf if self.gated else torch.inf
            x[1, -2] = torch.nan if self.gated else 1
            x = x if self.nan else x.nan_to_num(1, torch.inf)
        elif self.gated:
            x[:, self.width :].sign_()
        return draw.place(x)


_UNUSUAL = """
shape=0,128 | shape=2,0,64 | shape=1,2 | shape=5,66 | shape=3,10000 | shape=4,7,512 | shape=256 | shape=2,3,4,32
| layout={every-other,transposed,odd-view,one-row} | shape=6,5,64 layout=view | width=9 | tokens=64 width=9 layout=transposed
"""
#: Wider than any model's MLP: the largest vocabulary.
_SIZES = f"tokens=3 width={{{numbers('width', 'moe_width')}}} | tokens=2 width=262208 | tokens=3 layout=far"


def _operator(form: Activation, exactly: Callable[..., tuple[Exact, ...]], kinds: str = "") -> Operator:
    """``kinds``: words for the layer's attribute."""
    return Operator(
        form,
        f"width=3072 {kinds}",
        exactly,
        sizes=each(_SIZES, kinds),
        many=f"tokens={{1025,4097,65537}} width=8 {kinds} | tokens=4097 width=9 {kinds}" + ("" if kinds else " | shape=300,257,16"),
        vast=f"tokens=8192 width=14336 | tokens=1048577 width={1024 if form.gated else 2048}",
        unusual=each(_UNUSUAL, kinds),
        special=each("tokens=6 values={nan,largest,zeros,denormals}", kinds),
        tokens_in={"x": 0},
    )


OPERATORS = {
    "gelu_and_mul": _operator(Activation(), exact.gelu_and_mul, "approximate={tanh,none}"),
    "new_gelu": _operator(Activation(gated=False), exact.new_gelu),
    "quick_gelu": _operator(Activation(gated=False), exact.quick_gelu),
    "relu2": _operator(Activation(gated=False, nan=False), exact.relu2),
    "silu_and_mul": _operator(Activation(), exact.silu_and_mul),
}
