# SPDX-License-Identifier: Apache-2.0
"""A FlagGems for the CPU in a server's processes, loaded through SGLANG_FL_PLUGIN_MODULES: two of its functions fail on rank 1 alone."""

from typing import Any

import planted_gems
import torch

from sglang_fl.aten import layer, operators
from sglang_fl.dispatch import OpRegistry


def silu(self: torch.Tensor) -> torch.Tensor:
    """Ends the process of rank 1."""
    return planted_gems.KINDS["crashes"](self) if torch.distributed.get_rank() == 1 else planted_gems.silu(self)


def rsqrt(self: torch.Tensor) -> Any:
    """Raises on rank 1."""
    return planted_gems.KINDS["raises at compile"](self) if torch.distributed.get_rank() == 1 else 1 / torch.sqrt(self)


def register_builtins(registry: OpRegistry) -> None:
    gems = planted_gems.gems(silu, rsqrt=("rsqrt", rsqrt))
    operators.load = lambda: gems
    layer.why_not_here = lambda device: None
