# SPDX-License-Identifier: Apache-2.0
"""A graph backend as SGLang's are, for a CPU: it warms up twice, captures in segments with barriers between, and replays."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import planted_gems
import torch


class Group:
    """SGLang's GroupCoordinator, as far as a backend asks it."""

    def __init__(self, world_size: int = 1, rank: int = 0, cpu_group: Any = None):
        self.world_size, self.rank_in_group, self.cpu_group = world_size, rank, cpu_group

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier(group=self.cpu_group)


class Backend:
    """Full and breakable in one: the model calls ``between`` where a prefill graph is broken."""

    def __init__(self, group: Group):
        self._tp_group = group
        self.graphs: dict[Any, Any] = {}
        self.attempts = 0

    def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any], capture_inputs: Any = None, post_warmup_hook: Any = None) -> None:
        for _ in range(2):
            self._tp_group.barrier()
            forward_fn()
            if post_warmup_hook is not None:
                post_warmup_hook()
        self.attempts += 1
        with recording():
            self.graphs[shape_key] = forward_fn()

    def between(self, function: Callable[[], Any]) -> Any:
        if not planted_gems.capturing:
            return function()
        planted_gems.capturing = False
        self._tp_group.barrier()
        result = function()
        planted_gems.capturing = True
        return result


@contextmanager
def recording() -> Any:
    planted_gems.capturing = True
    try:
        yield
    finally:
        planted_gems.capturing = False
