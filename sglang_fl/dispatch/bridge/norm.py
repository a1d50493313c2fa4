# SPDX-License-Identifier: Apache-2.0
"""What the bridges of norms share."""

from typing import Any, ClassVar

import torch

from .base import OBJ, Bridge, Forward, Layer, Site, check_result, scratch

_TRIAL_TOKENS = 2


class NormObj:
    """Stands for a norm that keeps its constants under other names than the operators' texts give."""

    __slots__ = ("_tensors", "variance_epsilon")

    def __init__(self, tensors: dict[str, Any], variance_epsilon: float):
        self._tensors = tensors
        self.variance_epsilon = variance_epsilon

    @property
    def weight(self) -> torch.Tensor:
        # The layer's own dictionary: a weight that SGLang replaces is replaced here.
        return self._tensors["weight"]


def norm_obj(layer: Layer, dtype: torch.dtype, device: torch.device) -> NormObj:
    """What stands for a norm with ``eps``, kept with it; a norm without weights gets ones."""
    for tensors in (layer._parameters, layer._buffers):
        if "weight" in tensors:
            break
    else:
        tensors = {"weight": torch.ones(layer.hidden_size, dtype=dtype, device=device)}
    obj = layer.__dict__[OBJ] = NormObj(tensors, layer.eps)
    return obj


class NormBridge(Bridge):
    """A norm over the last dimension, which is called with the layer itself."""

    #: Whether its forward takes a residual.
    with_residual: ClassVar[bool] = False

    def _reason_in_attributes(self, layer: Layer) -> str | None:
        return None

    def _obj(self, layer: Layer, site: Site) -> Any:
        """What an implementation reads the weights from."""
        return layer

    def trial_key(self, layer: Layer, site: Site) -> tuple[Any, ...]:
        obj = self._obj(layer, site)
        return site.dtype, site.device, obj.weight.shape, obj.weight.dtype, obj.variance_epsilon

    def trial(self, layer: Layer, site: Site, fn: Forward) -> None:
        obj = self._obj(layer, site)
        x = scratch(site, _TRIAL_TOKENS, obj.weight.shape[0])
        check_result("its result", fn(obj, x.clone()), x)
        if not self.with_residual:
            return
        result = fn(obj, x.clone(), x.clone())
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"with a residual its result is {type(result).__name__}, not (normed, residual)")
        for what, part in zip(("its result", "its residual"), result, strict=True):
            check_result(what, part, x)
