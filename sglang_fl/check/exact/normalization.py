# SPDX-License-Identifier: Apache-2.0
import torch

from .judge import TINY, U32, Exact, exactly, summation


def _rms(x: torch.Tensor, residual: torch.Tensor | None, scale: torch.Tensor, scale_terms: torch.Tensor, eps: float) -> tuple[Exact, ...]:
    hidden = exactly(x) if residual is None else exactly(x) + exactly(residual)
    normed = hidden / torch.sqrt(hidden.square().mean(-1, keepdim=True) + eps)
    value = normed * scale
    lost = torch.where((hidden.abs() < TINY) | (value.abs() < TINY), value.abs(), 0.0)
    # The square root halves the roundings of the sum.
    result = Exact("result", value, (normed * scale_terms).abs(), summation(x.shape[-1]), lost)
    if residual is None:
        return (result,)
    return result, Exact("residual", hidden, hidden.abs(), 2, torch.where(hidden.abs() < TINY, hidden.abs(), 0.0))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, variance_epsilon: float, residual: torch.Tensor | None = None) -> tuple[Exact, ...]:
    return _rms(x, residual, exactly(weight), exactly(weight), variance_epsilon)


def gemma_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, variance_epsilon: float, residual: torch.Tensor | None = None
) -> tuple[Exact, ...]:
    return _rms(x, residual, 1 + exactly(weight), 1 + exactly(weight).abs(), variance_epsilon)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, variance_epsilon: float) -> tuple[Exact, ...]:
    hidden, w, b = exactly(x), exactly(weight), exactly(bias)
    mean = hidden.mean(-1, keepdim=True)
    centred = hidden - mean
    rstd = 1 / torch.sqrt(centred.square().mean(-1, keepdim=True) + variance_epsilon)
    normed = centred * rstd
    value = normed * w + b
    roundings = summation(x.shape[-1])
    # The mean has an error of a few roundings of the summed numbers, and so has each centred number.
    sizes = hidden.abs().mean(-1, keepdim=True)
    terms = ((2 * centred.abs() + sizes) * rstd * w).abs() + b.abs()
    # The variance is off by its square, which matters if the variance is as small.
    shift = (roundings * U32 * sizes * rstd).square().clamp(max=1.0)
    lost = (normed * w).abs() * shift
    lost = lost + torch.where(centred.abs() < TINY, (normed * w).abs(), 0.0) + torch.where(value.abs() < TINY, value.abs(), 0.0)
    return (Exact("result", value, terms.nan_to_num(), roundings, lost.nan_to_num()),)
