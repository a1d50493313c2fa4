# SPDX-License-Identifier: Apache-2.0
"""What the bridges of norms share."""

from typing import Any, ClassVar

import torch
from torch import nn

from .base import TRIAL_TOKENS, Forward, ModelContext, Routes, check_pair, check_result, scratch
from .layer import Layer, LayerBridge

#: The attribute of a norm with its :class:`NormObj`, see :func:`norm_obj`.
_OBJ = "_sglang_fl_obj"


class NormBridge(LayerBridge):
    """A norm over the last dimension: ``forward(x)``, and ``forward(x, residual, …)`` of those that add one."""

    #: Whether its forward takes a residual.
    with_residual: ClassVar[bool] = False
    #: Whether it has ``eps`` instead of ``variance_epsilon``, and perhaps no weights: implementations get an object in its place.
    has_eps: ClassVar[bool] = False

    def _obj(self, layer: Layer, context: ModelContext) -> Any:
        """What an implementation reads the weights from."""
        return norm_obj(layer, context.dtype, context.device) if self.has_eps else layer

    def trial_key(self, layer: Layer, context: ModelContext) -> tuple[Any, ...]:
        obj = self._obj(layer, context)
        return obj.weight.shape, obj.weight.dtype, obj.variance_epsilon

    def trial(self, layer: Layer, context: ModelContext, fn: Forward) -> None:
        obj = self._obj(layer, context)
        x = scratch(context, TRIAL_TOKENS, obj.weight.shape[0])
        check_result("its result", fn(obj, x.clone()), x)
        if self.with_residual:
            pair = check_pair(fn(obj, x.clone(), x.clone()), "(normed, residual)", "with a residual ")
            for what, part in zip(("its result", "its residual"), pair, strict=True):
                check_result(what, part, x)

    def forward(self, routes: Routes) -> Forward:
        if not self.has_eps:
            return _with_residual(routes)
        return _residual_of_obj(routes) if self.with_residual else _plain_of_obj(routes)


class NormObj:
    """The ``obj`` argument for a norm whose constants have other names than the operator's signature says."""

    __slots__ = ("_tensors", "variance_epsilon")

    def __init__(self, tensors: dict[str, Any], variance_epsilon: float):
        self._tensors = tensors
        self.variance_epsilon = variance_epsilon

    @property
    def weight(self) -> torch.Tensor:
        # The layer's own dictionary: a weight that SGLang replaces is replaced here.
        return self._tensors["weight"]


def norm_obj(layer: Layer, dtype: torch.dtype, device: torch.device) -> NormObj:
    """The :class:`NormObj` of a norm with ``eps``, cached on it; a norm without weights gets ones."""
    kept: NormObj | None = layer.__dict__.get(_OBJ)
    if kept is not None:
        return kept
    for tensors in (layer._parameters, layer._buffers):
        if "weight" in tensors:
            break
    else:
        tensors = {"weight": torch.ones(layer.hidden_size, dtype=dtype, device=device)}
    obj = layer.__dict__[_OBJ] = NormObj(tensors, layer.eps)
    return obj


def _with_residual(routes: Routes) -> Forward:
    """Of RMSNorm and GemmaRMSNorm; the latter has no ``quant_linear``."""
    fn, dtypes, own, contexts, divert, failed = routes

    def forward(
        self: Layer,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        post_residual_addition: torch.Tensor | None = None,
        quant_linear: nn.Module | None = None,
    ) -> Any:
        if quant_linear is not None:
            return own(self, x, residual, post_residual_addition, quant_linear)
        if post_residual_addition is not None:
            return own(self, x, residual, post_residual_addition)
        if contexts.active:
            return divert(self, x, residual)
        if dtypes is not None and x.dtype not in dtypes:
            return own(self, x, residual)
        try:
            return fn(self, x, residual)
        except Exception as error:
            return failed(self, error, (self, x, residual), (x, residual))

    return forward


def _residual_of_obj(routes: Routes) -> Forward:
    """Of Gemma3RMSNorm."""
    fn, dtypes, own, contexts, divert, failed = routes

    def forward(self: Layer, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if contexts.active:
            return divert(self, x, residual)
        if dtypes is not None and x.dtype not in dtypes:
            return own(self, x, residual)
        obj = self.__dict__.get(_OBJ) or norm_obj(self, x.dtype, x.device)
        try:
            return fn(obj, x, residual)
        except Exception as error:
            return failed(self, error, (obj, x, residual), (x, residual))

    return forward


def _plain_of_obj(routes: Routes) -> Forward:
    """Of norms that take no residual, and so must not be handed one: Gemma4RMSNorm, RMSNormWithoutScale."""
    fn, dtypes, own, contexts, divert, failed = routes

    def forward(self: Layer, x: torch.Tensor) -> Any:
        if contexts.active:
            return divert(self, x)
        if dtypes is not None and x.dtype not in dtypes:
            return own(self, x)
        obj = self.__dict__.get(_OBJ) or norm_obj(self, x.dtype, x.device)
        try:
            return fn(obj, x)
        except Exception as error:
            return failed(self, error, (obj, x), (x,))

    return forward
