# SPDX-License-Identifier: Apache-2.0
"""The ranks that share a model's layers, and their exchange of objects on the CPU."""

import logging
from typing import Any

import torch


class Ranks:
    """The ranks of a tensor-parallel group. Without a group: this process alone.

    Args:
        group: SGLang's GroupCoordinator.
    """

    def __init__(self, group: Any = None):
        self.group = group if group is not None and group.world_size > 1 else None

    @property
    def rank(self) -> int:
        return int(self.group.rank_in_group) if self.group is not None else 0

    @property
    def count(self) -> int:
        return int(self.group.world_size) if self.group is not None else 1

    def level(self, level: int) -> int:
        """The level of a line that all ranks log: DEBUG except on the first rank."""
        return level if self.rank == 0 else logging.DEBUG

    def exchange(self, value: Any) -> list[Any]:
        """Gather each rank's object, by rank. All ranks must call it."""
        if self.group is None:
            return [value]
        given: list[Any] = [None] * self.group.world_size
        torch.distributed.all_gather_object(given, value, group=self.group.cpu_group)
        return given


def tensor_parallel_ranks() -> Ranks:
    """The ranks of this process. SGLang must have created its groups."""
    from sglang.srt.runtime_context import get_parallel

    is_initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Ranks(get_parallel().tp_group if is_initialized else None)
