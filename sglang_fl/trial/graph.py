# SPDX-License-Identifier: Apache-2.0
"""A run inside a graph that is discarded: whether a function can be captured at all."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..utils.graphs import graphs_of


def capture_and_discard(function: Callable[[], Any], device: torch.device) -> None:
    """Capture a call. Nothing is executed, so what the function writes stays as it was. Without graphs on the device: nothing.

    Raises:
        Exception: what the function raised, or the device at the capture's end.
    """
    graphs = graphs_of(device)
    if graphs is None:
        return
    new_graph, capture = graphs
    module = torch.get_device_module(device)
    module.synchronize()
    new_pool = getattr(module, "graph_pool_handle", None)
    pool = new_pool() if new_pool is not None else None
    raised: Exception | None = None
    try:
        with _same_stream(module), capture(new_graph(), **({} if pool is None else {"pool": pool})):
            try:
                function()
            except Exception as error:
                raised = error  # the end of the capture raises another one, of no interest
                raise
    except Exception as error:
        recover(device, pool)
        raise (raised or error) from None


def recover(device: torch.device, pool: Any) -> None:
    """After a capture that failed: PyTorch's allocator and random numbers are left as if it went on.

    Args:
        pool: the graph's memory pool.
    """
    graphs = graphs_of(device)
    if graphs is None:
        return
    new_graph, capture = graphs
    module = torch.get_device_module(device)
    end, release = (getattr(torch._C, f"_{device.type}_{name}", None) for name in ("endAllocateToPool", "releasePool"))
    if end is not None and release is not None and pool is not None:
        with contextlib.suppress(RuntimeError):  # this PyTorch did it itself
            end(module.current_device(), pool)
            release(module.current_device(), pool)
    # A capture that ends well puts the generators right.
    with warnings.catch_warnings(), _same_stream(module):
        warnings.filterwarnings("ignore", message="The .* Graph is empty")
        with capture(new_graph()):
            pass


@contextlib.contextmanager
def _same_stream(module: Any) -> Any:
    """A capture that fails at its end leaves its own stream behind as the current one."""
    outside = module.current_stream()
    try:
        yield
    finally:
        if module.current_stream() != outside:
            module.set_stream(outside)
