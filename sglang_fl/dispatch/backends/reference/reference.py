# SPDX-License-Identifier: Apache-2.0
"""The reference backend: every operator in plain PyTorch."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .. import Backend

if TYPE_CHECKING:
    import torch


class ReferenceBackend(Backend):
    """fp32 inside, one rounding at the end, inputs never written."""

    name = "reference"

    def is_available(self) -> bool:
        return True

    @cached_property
    def _impl(self) -> Any:
        # Not at the top: tools list the backends without paying for the import of PyTorch.
        return import_module(f"{__package__}.impl")

    def silu_and_mul(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        return self._impl.silu_and_mul(x)

    def rms_norm(self, obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self._impl.rms_norm(x, obj.weight, obj.variance_epsilon, residual)

    def rotary_embedding(
        self,
        obj: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        position_ids: torch.Tensor,
        rotary_interleaved: bool = False,
        inplace: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._impl.rotary_embedding(query, key, cos, sin, position_ids, rotary_interleaved)
