# SPDX-License-Identifier: Apache-2.0
"""One of two ranks that capture a graph; a function fails on rank 1 alone, first in its trial or first in SGLang's capture.

python aten_ranks.py RANK STORE WHEN
"""

import sys

import planted_gems
import torch
from aten_backend import Backend, Group

from sglang_fl.aten import AtenOperators, capture, scope, trials
from sglang_fl.aten.trials import Trials
from sglang_fl.config import Settings
from sglang_fl.distributed.ranks import Ranks


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = Group(2, rank, torch.distributed.group.WORLD)
    for module in (trials, capture):
        module.is_capturing = lambda: planted_gems.capturing  # type: ignore[attr-defined]
    # SGLang's barriers, as the hook on them meets them.
    own = Group.barrier
    Group.barrier = lambda self: scope._barrier(own, self)  # type: ignore[method-assign]
    for when in ("trial", "capture"):
        print(when, *captures(group, when))


def captures(group: Group, when: str) -> tuple[int, list[int], str | None]:
    """Of two shapes: how many attempts that took, the shapes captured, and why the function was left out."""

    def fails(self: torch.Tensor) -> torch.Tensor:
        if group.rank_in_group == 1 and (when == "trial" or planted_gems.capturing):
            raise planted_gems.StreamCaptureUnsupported("on one rank only")
        return planted_gems.silu(self)

    found = AtenOperators(Settings(), Trials())
    x = torch.linspace(-3, 3, 12)
    backend = Backend(group)

    def model() -> torch.Tensor:
        first = torch.nn.functional.silu(x)
        backend.between(lambda: torch.distributed.all_reduce(first.clone()))
        return torch.nn.functional.silu(first)

    with planted_gems.in_place_of_flaggems(planted_gems.gems(fails)):
        found.enable()
        found.disable()
        for shape in (2, 1):
            scope._in_graphs = (found, Ranks())
            scope._capture_one(backend, backend.capture_one, shape, model)
    torch.testing.assert_close(backend.graphs[1], torch.nn.functional.silu(torch.nn.functional.silu(x)))
    return backend.attempts, sorted(backend.graphs), {function: reason for _, function, reason in found.report.left}.get("silu")


if __name__ == "__main__":
    main()
