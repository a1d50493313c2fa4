# SPDX-License-Identifier: Apache-2.0
from typing import Any, ClassVar

import torch

from .base import Bridge, Forward, Layer, Routes, Site, check_result, scratch

_TRIAL_TOKENS = 2
_UNKNOWN_SIZE = 128


class ActivationBridge(Bridge):
    """SGLang's activations without weights: ``forward(x)``."""

    #: Whether x holds two halves, a gate and what it is multiplied with.
    gated: ClassVar[bool] = False

    def _reason_in_attributes(self, layer: Layer) -> str | None:
        return None

    def trial_key(self, layer: Layer, site: Site) -> tuple[Any, ...]:
        return site.dtype, site.device, site.intermediate_size

    def trial(self, layer: Layer, site: Site, fn: Forward) -> None:
        size = site.intermediate_size or _UNKNOWN_SIZE
        x = scratch(site, _TRIAL_TOKENS, 2 * size if self.gated else size)
        check_result("its result", fn(layer, x), x, (_TRIAL_TOKENS, size))

    def forward(self, routes: Routes) -> Forward:
        fn, dtypes, own = routes.fn, routes.dtypes, routes.own
        contexts, divert, failed = routes.contexts, routes.divert, routes.failed

        def forward(self: Layer, x: torch.Tensor) -> torch.Tensor:
            if contexts.active:
                return divert(self, x)
            if dtypes is not None and x.dtype not in dtypes:
                return own(self, x)
            try:
                return fn(self, x)
            except Exception as error:
                return failed(self, error, (x,), (x,))

        return forward


class GeluAndMulBridge(ActivationBridge):
    op = "gelu_and_mul"
    gated = True
    npu_switch = "SGLANG_NPU_FORWARD_NATIVE_GELUTANH"

    def _reason_in_attributes(self, layer: Layer) -> str | None:
        return None if layer.approximate in ("none", "tanh") else f"approximate={layer.approximate!r}"

    def trial_key(self, layer: Layer, site: Site) -> tuple[Any, ...]:
        return *super().trial_key(layer, site), layer.approximate


class NewGELUBridge(ActivationBridge):
    op = "new_gelu"
    shared = True  # get_act_fn gives every caller the same object


class QuickGELUBridge(ActivationBridge):
    op = "quick_gelu"


class ReLU2Bridge(ActivationBridge):
    op = "relu2"
    shared = True  # get_act_fn gives every caller the same object


class SiluAndMulBridge(ActivationBridge):
    op = "silu_and_mul"
    gated = True

    def reason_at(self, site: Site) -> str | None:
        return "SGLang fuses it with the FP8 quantisation that follows" if site.fuses_activation else None
