# SPDX-License-Identifier: Apache-2.0
"""Graphs on the CPU: of a function (:class:`Graph`), and a stand-in for a chip with decode graphs, through SGLang's own hooks. Its replay
runs SGLang's eager step.

During captures and replays ``planted_gems.capturing`` is true. So functions can tell a graph from the warm-up before it.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import planted_gems
import torch
from installed_packages import write_package
from torch.utils._python_dispatch import TorchDispatchMode

#: Server arguments. SGLang asks for a CPU's graphs only with --enable-torch-compile.
ARGUMENTS = ("--enable-torch-compile", "--cuda-graph-bs-decode", "1", "16")

_CHIP = """
from sglang_fl.vendor_platform import VendorPlatform

PLATFORM = VendorPlatform(
    name="graphchip", device_type="cpu", is_present=lambda: True, capabilities=("graph_capture",), graph_runner="graphs_on_cpu:GraphRunner"
)
"""


def install(directory: Path, environ: dict[str, str]) -> dict[str, str]:
    """The environment of a process that finds the chip."""
    write_package(directory, "graphchip", _CHIP, {"sglang_fl.platform": "graphchip:PLATFORM"})
    return {**environ, "PYTHONPATH": os.pathsep.join([str(directory), environ["PYTHONPATH"]])}


class Graph(TorchDispatchMode):
    """A graph for the CPU: what PyTorch runs inside it runs again, on the same tensors, and nothing else does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or else the first capture imports torch.compile, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (out, again)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def capture(graph: Graph) -> Iterator[None]:
    with graph:
        yield


class GraphRunner:
    """SGLang's runner of decode graphs."""

    def __init__(self, model_runner: Any):
        from sglang.srt.model_executor.runner import EagerRunner, get_batch_sizes_to_capture

        self._eager = EagerRunner(model_runner, run_warmup=False)
        model_runner.attn_backend.get_cuda_graph_seq_len_fill_value = lambda: 1  # SGLang's torch_native attention does not define it
        self.capture_bs, _ = get_batch_sizes_to_capture(model_runner)
        for size in self.capture_bs:
            for planted_gems.capturing in (False, False, True):
                self._eager._dummy_run(size, buffers=self._eager._alloc_dummy_decode_buffers(size, num_tokens_per_req=1))
        planted_gems.capturing = False
        self._replays: Counter[int] = Counter()

    def can_run_graph(self, forward_batch: Any) -> bool:
        return bool(forward_batch.batch_size <= min(planted_gems.largest_graph, max(self.capture_bs)))

    def execute(self, forward_batch: Any, **kwargs: Any) -> Any:
        size = min(size for size in self.capture_bs if size >= forward_batch.batch_size)
        self._replays[size] += 1
        planted_gems.capturing, planted_gems.replays = True, self._replays[size]
        try:
            return self._eager.execute(forward_batch, **kwargs)
        finally:
            planted_gems.capturing = False
