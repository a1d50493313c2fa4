# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..exact import normalization as exact
from ..exact.judge import DTYPES, Exact
from .call import Call, Draw, Layer, Named, Operator, scaled_rows

_SHAPES = ((0, 128), (2, 0, 64), (3, 1), (5, 33), (33, 80), (3, 5000), (3, 16384), (4, 7, 512), (128,), (2, 3, 4, 32))


@dataclass(frozen=True)
class _Norm:
    """The calls of one norm.

    Attributes:
        residuals: whether a residual is added: without, and with, where its signature has one.
        biased: whether its layer has a bias.
        weight_dtype: of its weights and bias, where a case is not about that; None: that of x.
        largest: numbers beyond it leave the range of fp32, in which the arithmetic is.
    """

    residuals: tuple[bool, ...] = (False, True)
    biased: bool = False
    weight_dtype: torch.dtype | None = None
    # The squares of larger ones are infinite.
    largest: float = 1e17

    def _weights(self, draw: Draw, *shape: int) -> torch.Tensor:
        return draw.normal(*shape, dtype=self.weight_dtype)

    def _layer(self, draw: Draw, weight: torch.Tensor, eps: float = 1e-6) -> Layer:
        return Layer(weight, eps, draw.normal(weight.shape[0], dtype=weight.dtype) if self.biased else None)

    def _call(
        self, draw: Draw, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None, **guarded: torch.Tensor
    ) -> Call:
        layer = self._layer(draw, weight)
        if residual is None:
            return Call(layer, {"x": x}, guarded=guarded)
        return Call(layer, {"x": x, "residual": residual}, frozenset({"x", "residual"}), guarded)

    def _drawn(
        self,
        draw: Draw,
        shape: tuple[int, ...],
        residual: bool = False,
        scale: float = 3.0,
        offset: float = 0.0,
        weight_dtype: torch.dtype | None = None,
        eps: float = 1e-6,
    ) -> Call:
        x = draw.place(torch.randn(shape, generator=draw.rng) * scale + offset)
        weight = draw.normal(shape[-1], dtype=weight_dtype or self.weight_dtype)
        call = self._call(draw, x, weight, draw.normal(*shape, scale=10) if residual else None)
        call.layer.variance_epsilon = eps
        return call

    def _with_residuals(self, name: str, **drawn: object) -> Iterator[Named]:
        for residual in self.residuals:
            yield f"{name}, residual" if residual else name, partial(self._drawn, residual=residual, **drawn)  # type: ignore[arg-type]

    def forms(self, tokens: int, hidden: int) -> Iterator[Named]:
        yield from self._with_residuals(f"{tokens} × {hidden}", shape=(tokens, hidden))

    def unusual(self) -> Iterator[Named]:
        for shape in _SHAPES:
            yield from self._with_residuals(f"shape {shape}", shape=shape)
        for dtype in DTYPES:
            yield from self._with_residuals(f"weights in {dtype}", shape=(7, 256), weight_dtype=dtype)
        for eps in (1e-5, 1e-2, 0.0):
            yield f"epsilon {eps}", partial(self._drawn, shape=(7, 256), scale=0.1, eps=eps)
        # Here epsilon decides.
        yield "small numbers", partial(self._drawn, shape=(7, 256), scale=1e-3)
        yield "numbers far from zero", partial(self._drawn, shape=(7, 256), offset=100.0)

        def heads_of_a_projection(draw: Draw) -> Call:
            qkv = draw.normal(9, 6 * 64)
            return self._call(
                draw, qkv[:, :256].unflatten(1, (4, 64)), self._weights(draw, 64), **{"the rest of the projection": qkv[:, 256:]}
            )

        yield "heads of a packed projection", heads_of_a_projection
        yield "transposed", lambda draw: self._call(draw, draw.normal(64, 9).t(), self._weights(draw, 64))
        yield "weights not contiguous", lambda draw: self._call(draw, draw.normal(9, 64), self._weights(draw, 64, 2)[:, 0])
        for residual in self.residuals:
            yield from self._strided(residual)

    def _strided(self, residual: bool) -> Iterator[Named]:
        def columns(draw: Draw) -> Call:
            x = draw.normal(6, 5, 192)
            x, other, rest = x[..., :64], x[..., 64:128], x[..., 128:]
            return self._call(draw, x, self._weights(draw, 64), other if residual else None, **{"the columns behind": rest})

        def every_other_row(draw: Draw) -> Call:
            x, other = draw.normal(14, 128), draw.normal(14, 128)
            between = {"the rows between": x[1::2], "the residual's": other[::2]}
            return self._call(draw, x[::2], self._weights(draw, 128), other[1::2] if residual else None, **between)

        def batch_second(draw: Draw) -> Call:
            x, other = draw.normal(5, 9, 64).transpose(0, 1), draw.normal(9, 5, 64)
            return self._call(draw, x, self._weights(draw, 64), other if residual else None)

        for name, make in (("columns of a wider tensor", columns), ("every other row", every_other_row), ("batch second", batch_second)):
            yield f"{name}, residual" if residual else name, make

    def special(self) -> Iterator[Named]:
        def nan_and_infinity(draw: Draw, residual: bool) -> Call:
            x, other = torch.randn(2, 6, 64, generator=draw.rng)
            x[0, 3], x[1, 5], x[2, 7], x[3, 0], other[3, 0] = torch.nan, torch.inf, -torch.inf, torch.inf, -torch.inf
            return self._call(draw, draw.place(x), self._weights(draw, 64), draw.place(other) if residual else None)

        for residual in self.residuals:
            yield "nan and infinity, residual" if residual else "nan and infinity", partial(nan_and_infinity, residual=residual)
        yield from scaled_rows(lambda draw, x: self._call(draw, draw.place(x), self._weights(draw, 64)), self.largest)


def _operator(norm: _Norm, exactly: Callable[[Call], tuple[Exact, ...]]) -> Operator:
    return Operator(norm.forms, norm.unusual, norm.special, exactly, tokens_in={"x": 0, "residual": 0})


def _weight(call: Call) -> torch.Tensor:
    assert call.layer.weight is not None
    return call.layer.weight


def _layer_norm_exactly(call: Call) -> tuple[Exact, ...]:
    assert call.layer.bias is not None
    return exact.layer_norm(call.inputs["x"], _weight(call), call.layer.bias, call.layer.variance_epsilon)


OPERATORS = {
    "gemma_rms_norm": _operator(
        _Norm(),
        lambda call: exact.gemma_rms_norm(call.inputs["x"], _weight(call), call.layer.variance_epsilon, call.inputs.get("residual")),
    ),
    # SGLang makes LayerNorm's weights in fp32 for models of any dtype.
    "layer_norm": _operator(_Norm(residuals=(False,), biased=True, weight_dtype=torch.float32), _layer_norm_exactly),
    "rms_norm": _operator(
        _Norm(),
        lambda call: exact.rms_norm(call.inputs["x"], _weight(call), call.layer.variance_epsilon, call.inputs.get("residual")),
    ),
}
