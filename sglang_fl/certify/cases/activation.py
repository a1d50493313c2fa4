# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from functools import partial

import torch

from .. import exact
from .call import Call, Draw, Layer, Named, Operator, scaled_rows


def _silu_and_mul_forms(tokens: int, hidden: int) -> Iterator[Named]:
    size = 3 * hidden if tokens <= 512 else hidden
    yield f"{tokens} × 2·{size}", partial(_drawn_activation, shape=(tokens, 2 * size))


def _activation(x: torch.Tensor, **guarded: torch.Tensor) -> Call:
    return Call(Layer(), {"x": x}, guarded=guarded)


def _drawn_activation(draw: Draw, shape: tuple[int, ...]) -> Call:
    return _activation(draw.normal(*shape, scale=4))


def _silu_and_mul_unusual() -> Iterator[Named]:
    for shape in ((0, 128), (2, 0, 64), (1, 2), (5, 66), (3, 10000), (4, 7, 512), (256,), (2, 3, 4, 32)):
        yield f"shape {shape}", partial(_drawn_activation, shape=shape)

    def every_other_row(draw: Draw) -> Call:
        x = draw.normal(14, 128)
        return _activation(x[::2], **{"the rows between": x[1::2]})

    def columns(draw: Draw) -> Call:
        x = draw.normal(6, 5, 192)
        return _activation(x[..., 64:128], **{"the columns before": x[..., :64], "the columns behind": x[..., 128:]})

    yield "every other row", every_other_row
    yield "columns of a wider tensor", columns
    yield "columns that begin at odd numbers", lambda draw: _activation(draw.normal(6, 67)[:, 3:])
    yield "transposed", lambda draw: _activation(draw.normal(64, 9).t())
    yield "one row for all", lambda draw: _activation(draw.normal(1, 64).expand(5, 64))


def _silu_and_mul_special() -> Iterator[Named]:
    def nan_and_infinity(draw: Draw) -> Call:
        gate, up = torch.randn(2, 6, 64, generator=draw.rng).abs() + 0.1
        gate[0, 3], up[1, 5], gate[2, 7] = torch.nan, torch.nan, torch.inf
        up[3, 0], up[4, 63] = torch.inf, -torch.inf
        return _activation(draw.place(torch.cat((gate, up), -1)))

    yield "nan and infinity", nan_and_infinity
    yield from scaled_rows(lambda draw, x: _activation(draw.place(torch.cat((x, x.flip(-1).sign()), -1))))


OPERATORS = {
    "silu_and_mul": Operator(
        _silu_and_mul_forms,
        _silu_and_mul_unusual,
        _silu_and_mul_special,
        lambda call: exact.silu_and_mul(call.inputs["x"]),
    ),
}
