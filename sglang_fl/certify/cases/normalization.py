# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from functools import partial

import torch

from .. import exact
from ..exact import Exact
from .call import Call, Draw, Layer, Named, Operator, scaled_rows


def _norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None, **guarded: torch.Tensor) -> Call:
    if residual is None:
        return Call(Layer(weight), {"x": x}, guarded=guarded)
    return Call(Layer(weight), {"x": x, "residual": residual}, frozenset({"x", "residual"}), guarded)


def _drawn_norm(
    draw: Draw,
    shape: tuple[int, ...],
    residual: bool = False,
    scale: float = 3.0,
    weight_dtype: torch.dtype | None = None,
    eps: float = 1e-6,
) -> Call:
    x, weight = draw.normal(*shape, scale=scale), draw.normal(shape[-1], dtype=weight_dtype)
    call = _norm(x, weight, draw.normal(*shape, scale=10) if residual else None)
    call.layer.variance_epsilon = eps
    return call


def _rms_norm_forms(tokens: int, hidden: int) -> Iterator[Named]:
    yield f"{tokens} × {hidden}", partial(_drawn_norm, shape=(tokens, hidden))
    yield f"{tokens} × {hidden}, residual", partial(_drawn_norm, shape=(tokens, hidden), residual=True)


def _rms_norm_unusual() -> Iterator[Named]:
    for shape in ((0, 128), (2, 0, 64), (3, 1), (5, 33), (33, 80), (3, 5000), (3, 16384), (4, 7, 512), (128,), (2, 3, 4, 32)):
        yield f"shape {shape}", partial(_drawn_norm, shape=shape)
        yield f"shape {shape}, residual", partial(_drawn_norm, shape=shape, residual=True)
    for dtype in exact.DTYPES:
        yield f"weights in {dtype}", partial(_drawn_norm, shape=(7, 256), weight_dtype=dtype)
        yield f"weights in {dtype}, residual", partial(_drawn_norm, shape=(7, 256), weight_dtype=dtype, residual=True)
    for eps in (1e-5, 1e-2, 0.0):
        yield f"epsilon {eps}", partial(_drawn_norm, shape=(7, 256), scale=0.1, eps=eps)
    # Here epsilon decides.
    yield "small numbers", partial(_drawn_norm, shape=(7, 256), scale=1e-3)

    def heads_of_a_projection(draw: Draw) -> Call:
        qkv = draw.normal(9, 6 * 64)
        return _norm(qkv[:, :256].unflatten(1, (4, 64)), draw.normal(64), **{"the rest of the projection": qkv[:, 256:]})

    def columns(draw: Draw) -> Call:
        x = draw.normal(6, 5, 192)
        x, residual, rest = x[..., :64], x[..., 64:128], x[..., 128:]
        return _norm(x, draw.normal(64), residual, **{"the columns behind": rest})

    def every_other_row(draw: Draw) -> Call:
        x, residual = draw.normal(14, 128), draw.normal(14, 128)
        return _norm(x[::2], draw.normal(128), residual[1::2], **{"the rows between": x[1::2], "the residual's": residual[::2]})

    yield "heads of a packed projection", heads_of_a_projection
    yield "columns of a wider tensor, residual", columns
    yield "every other row, residual", every_other_row
    yield "transposed", lambda draw: _norm(draw.normal(64, 9).t(), draw.normal(64))
    yield "transposed, residual", lambda draw: _norm(draw.normal(5, 9, 64).transpose(0, 1), draw.normal(64), draw.normal(9, 5, 64))
    yield "weights not contiguous", lambda draw: _norm(draw.normal(9, 64), draw.normal(64, 2)[:, 0])


def _rms_norm_special() -> Iterator[Named]:
    def nan_and_infinity(draw: Draw, residual: bool) -> Call:
        x, other = torch.randn(2, 6, 64, generator=draw.rng)
        x[0, 3], x[1, 5], x[2, 7], x[3, 0], other[3, 0] = torch.nan, torch.inf, -torch.inf, torch.inf, -torch.inf
        return _norm(draw.place(x), draw.normal(64), draw.place(other) if residual else None)

    yield "nan and infinity", partial(nan_and_infinity, residual=False)
    yield "nan and infinity, residual", partial(nan_and_infinity, residual=True)
    # Beyond 1e18 the squares leave the range of fp32, in which the arithmetic is.
    yield from scaled_rows(lambda draw, x: _norm(draw.place(x), draw.normal(64)), largest=1e17)


def _rms_norm_exactly(call: Call) -> tuple[Exact, ...]:
    assert call.layer.weight is not None
    return exact.rms_norm(call.inputs["x"], call.layer.weight, call.layer.variance_epsilon, call.inputs.get("residual"))


OPERATORS = {
    "rms_norm": Operator(_rms_norm_forms, _rms_norm_unusual, _rms_norm_special, _rms_norm_exactly),
}
