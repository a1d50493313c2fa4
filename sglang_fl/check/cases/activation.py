# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..exact import activation as exact
from ..exact.judge import Exact
from .call import Call, Draw, Layer, Named, Operator, scaled_rows


@dataclass(frozen=True)
class _Activation:
    """The calls of one activation.

    Attributes:
        halves: 2 where x holds a gate and what it is multiplied with.
        nan: whether nan must come out of nan.
        approximate: its layer's, and a name for it.
    """

    halves: int = 2
    nan: bool = True
    approximate: str = ""

    def _call(self, x: torch.Tensor, **guarded: torch.Tensor) -> Call:
        return Call(Layer(approximate=self.approximate), {"x": x}, guarded=guarded)

    def _named(self, name: str) -> str:
        return f"{name}, {self.approximate}" if self.approximate else name

    def _drawn(self, draw: Draw, shape: tuple[int, ...]) -> Call:
        return self._call(draw.normal(*shape, scale=4))

    def forms(self, tokens: int, hidden: int) -> Iterator[Named]:
        size = 3 * hidden if tokens <= 512 else hidden
        width = f"2·{size}" if self.halves == 2 else f"{size}"
        yield self._named(f"{tokens} × {width}"), partial(self._drawn, shape=(tokens, self.halves * size))

    def unusual(self) -> Iterator[Named]:
        yield from ((self._named(name), make) for name, make in self._unusual())

    def _unusual(self) -> Iterator[Named]:
        for shape in ((0, 128), (2, 0, 64), (1, 2), (5, 66), (3, 10000), (4, 7, 512), (256,), (2, 3, 4, 32)):
            yield f"shape {shape}", partial(self._drawn, shape=shape)

        def every_other_row(draw: Draw) -> Call:
            x = draw.normal(14, 128)
            return self._call(x[::2], **{"the rows between": x[1::2]})

        def columns(draw: Draw) -> Call:
            x = draw.normal(6, 5, 192)
            return self._call(x[..., 64:128], **{"the columns before": x[..., :64], "the columns behind": x[..., 128:]})

        yield "every other row", every_other_row
        yield "columns of a wider tensor", columns
        yield "columns that begin at odd numbers", lambda draw: self._call(draw.normal(6, 67)[:, 3:])
        yield "transposed", lambda draw: self._call(draw.normal(64, 9).t())
        yield "one row for all", lambda draw: self._call(draw.normal(1, 64).expand(5, 64))

    def special(self) -> Iterator[Named]:
        def nan_and_infinity(draw: Draw) -> Call:
            gate, up = torch.randn(2, 6, 64, generator=draw.rng).abs() + 0.1
            gate[2, 7] = torch.inf
            if self.nan:
                gate[0, 3] = torch.nan
            up[1, 5], up[3, 0], up[4, 63] = torch.nan, torch.inf, -torch.inf
            return self._call(draw.place(torch.cat((gate, up), -1) if self.halves == 2 else gate))

        def scaled(draw: Draw, x: torch.Tensor) -> Call:
            return self._call(draw.place(torch.cat((x, x.flip(-1).sign()), -1) if self.halves == 2 else x))

        yield self._named("nan and infinity" if self.nan else "infinity"), nan_and_infinity
        yield from ((self._named(name), make) for name, make in scaled_rows(scaled))


_GELU_KINDS = tuple(_Activation(approximate=approximate) for approximate in ("tanh", "none"))


def _of_each_kind(calls: Callable[[_Activation], Iterator[Named]]) -> Iterator[Named]:
    for kind in _GELU_KINDS:
        yield from calls(kind)


def _operator(kind: _Activation, exactly: Callable[[torch.Tensor], tuple[Exact, ...]]) -> Operator:
    return Operator(kind.forms, kind.unusual, kind.special, lambda call: exactly(call.inputs["x"]), tokens_in={"x": 0})


OPERATORS = {
    "gelu_and_mul": Operator(
        lambda tokens, hidden: _of_each_kind(lambda kind: kind.forms(tokens, hidden)),
        lambda: _of_each_kind(_Activation.unusual),
        lambda: _of_each_kind(_Activation.special),
        lambda call: exact.gelu_and_mul(call.inputs["x"], call.layer.approximate),
        tokens_in={"x": 0},
    ),
    "new_gelu": _operator(_Activation(halves=1), exact.new_gelu),
    "quick_gelu": _operator(_Activation(halves=1), exact.quick_gelu),
    "relu2": _operator(_Activation(halves=1, nan=False), exact.relu2),
    "silu_and_mul": _operator(_Activation(), exact.silu_and_mul),
}
