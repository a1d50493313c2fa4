# SPDX-License-Identifier: Apache-2.0
"""A run inside a graph that is discarded: whether a function can be captured at all."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..utils.graphs import graphs_of


def capture_and_discard(function: Callable[[], Any], device: torch.device) -> None:
    """Capture a call and discard the graph. Nothing is executed or written. On a device without graphs this does nothing.

    Raises:
        Exception: raised by the function, or by the device at the end of the capture.
    """
    graphs = graphs_of(device)
    if graphs is None:
        return
    new_graph, capture = graphs
    module = torch.get_device_module(device)
    module.synchronize()
    new_pool = getattr(module, "graph_pool_handle", None)
    pool = new_pool() if new_pool is not None else None
    raised: BaseException | None = None
    try:
        with _same_stream(module), capture(new_graph(), **({} if pool is None else {"pool": pool})):
            try:
                function()
            except BaseException as error:  # sys.exit, too
                raised = error  # the end of the capture raises a second, irrelevant one
                raise
    except BaseException as error:
        recover(device, pool)
        raise (raised or error) from None


def recover(device: torch.device, pool: Any) -> Any:
    """Clean up after a failed capture: PyTorch leaves its allocator and random generators as if capturing.

    Args:
        pool: the graph's memory pool.

    Returns:
        An empty graph in the pool. Keep it until the pool has another: PyTorch refuses a pool whose graphs are gone while any of its
        memory is held. None: the device has no graphs.
    """
    graphs = graphs_of(device)
    if graphs is None:
        return None
    new_graph, capture = graphs
    module = torch.get_device_module(device)
    end, release = (getattr(torch._C, f"_{device.type}_{name}", None) for name in ("endAllocateToPool", "releasePool"))
    if end is not None and pool is not None:
        try:
            end(module.current_device(), pool)
        except RuntimeError:
            release = None  # this PyTorch has cleaned up itself
    # A successful capture resets the generators.
    empty = new_graph()
    with warnings.catch_warnings(), _same_stream(module):
        warnings.filterwarnings("ignore", message="The .* Graph is empty")
        with capture(empty, **({} if pool is None else {"pool": pool})):
            pass
    if release is not None and pool is not None:
        release(module.current_device(), pool)
    return empty


@contextlib.contextmanager
def _same_stream(module: Any) -> Any:
    """Restore the current stream: a capture that fails at its end leaves its own stream current."""
    outside = module.current_stream()
    try:
        yield
    finally:
        if module.current_stream() != outside:
            module.set_stream(outside)
