# SPDX-License-Identifier: Apache-2.0
"""The FlagGems backend: FlagGems's kernels behind the operators' signatures."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .. import Backend
from .library import why_unavailable

if TYPE_CHECKING:
    import torch


class FlagGemsBackend(Backend):
    """Triton kernels, on every chip that FlagGems serves."""

    name = "flaggems"

    def is_available(self) -> bool:
        return self.why_unavailable() is None

    def why_unavailable(self) -> str | None:
        return why_unavailable()

    @cached_property
    def _impl(self) -> Any:
        # Importing it imports FlagGems, which only a process that runs a model should pay for.
        return import_module(f"{__package__}.impl")

    def silu_and_mul(self, obj: Any, x: torch.Tensor) -> torch.Tensor:
        return self._impl.silu_and_mul(x)

    def rms_norm(self, obj: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self._impl.rms_norm(x, residual, obj.weight, obj.variance_epsilon)

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
        return self._impl.rotary_embedding(query, key, cos, sin, position_ids, rotary_interleaved, inplace)
