# SPDX-License-Identifier: Apache-2.0
"""Ranks that stay alive between tests: processes of a torch.distributed world over the stand-in for libflagcx."""

import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from sglang_fl.utils.server import free_port

#: Set in each rank: its device, its groups by size over FlagCX and over the vendor's own backend, and the FlagCXSetup.
state: dict[str, Any] = {}


def _serve(rank: int, world_size: int, port: int, environ: Mapping[str, str], calls: Connection) -> None:
    os.environ.update(environ)
    while True:
        try:
            function, args = calls.recv()
        except EOFError:
            return
        try:
            calls.send((True, function(rank, world_size, port, *args)))
        except BaseException as error:
            calls.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class RankFailed(AssertionError):
    """A function failed on a rank; the message has its traceback."""


class Ranks:
    """The ranks of a world, each waiting for a function to run."""

    def __init__(self, environ: Sequence[Mapping[str, str]]):
        context = multiprocessing.get_context("spawn")
        self.size = len(environ)
        self._ends: list[Connection] = []
        self._is_stuck = False
        self.processes = []
        port = free_port()
        for rank, variables in enumerate(environ):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, dict(variables), theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        for end in self._ends:
            end.send((function, args))

    def result(self, rank: int, timeout: float = 240) -> Any:
        """What the function returned on a rank, or the text of what it raised as RankFailed.

        Raises:
            TimeoutError: the rank said nothing in time.
        """
        if not self._ends[rank].poll(0 if self._is_stuck else timeout):
            self._is_stuck = True
            raise TimeoutError(f"rank {rank} said nothing for {timeout} s")
        good, value = self._ends[rank].recv()
        if not good:
            raise RankFailed(f"rank {rank}: {value}")
        return value

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function of an importable module on all ranks; returns each one's result."""
        self.start(function, *args)
        return [self.result(rank) for rank in range(self.size)]

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self.processes:
            process.join(3)
            process.kill()
            process.join()


@contextmanager
def ranks(environ: Sequence[Mapping[str, str]]) -> Iterator[Ranks]:
    world = Ranks(environ)
    try:
        yield world
    finally:
        world.close()


def join_world(rank: int, world_size: int, port: int, backend: str = "flagcx", limit: float = 30.0) -> str:
    """Make the default group as SGLang does, after the settings in the environment; returns its backend's class."""
    import torch
    import torch.distributed as dist

    from sglang_fl.config import load_settings
    from sglang_fl.device import Device
    from sglang_fl.distributed.setup import FlagCXSetup

    torch.set_num_threads(1)
    if torch.cuda.is_available():
        state["device"], state["vendor"] = torch.device("cuda", rank), "nccl"
        torch.cuda.set_device(state["device"])
        device = Device("nvidia", "cuda", "cuda", "test")
    else:
        state["device"], state["vendor"] = torch.device("cpu"), "gloo"
        device = Device("cpu", "cpu", None, "test")
    if backend == "flagcx":
        state["setup"] = FlagCXSetup(load_settings(os.environ, device=device), device.device_type, state["vendor"], limit)
        state["setup"].register_backend()
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", world_size=world_size, rank=rank, timeout=timedelta(seconds=60))
    return type(dist.group.WORLD._get_backend(state["device"])).__name__


@dataclass(frozen=True)
class Outcome:
    """What became of a rank: its default group's backend or what was raised, its warnings, the sum of all ranks' 1."""

    backend: str = ""
    error: str = ""
    warnings: tuple[str, ...] = ()
    total: float = 0
    seconds: float = 0


def meet(rank: int, world_size: int, port: int, environ: Sequence[Mapping[str, str]], new_port: int, limit: float) -> Outcome:
    """Join a new world with the settings given for each rank (none: FlagCX was not chosen there), and use it."""
    import torch
    import torch.distributed as dist

    for name in [name for name in os.environ if "FLAGCX" in name or name.startswith("SGLANG_FL_")]:
        del os.environ[name]
    os.environ.update(environ[rank])
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("sglang_fl").addHandler(handler)
    started = time.monotonic()
    try:
        backend = join_world(rank, world_size, new_port, "flagcx" if environ[rank] else "gloo", limit)
        seconds = time.monotonic() - started
        total = torch.ones(1)
        dist.all_reduce(total)
        group = dist.new_group(list(range(world_size)), backend="flagcx" if environ[rank] else "gloo")
        dist.all_reduce(total, group=group)
        return Outcome(backend, "", tuple(record.getMessage() for record in records), total.item(), seconds)
    except Exception as error:
        return Outcome("", f"{type(error).__name__}: {error}", tuple(record.getMessage() for record in records))
    finally:
        logging.getLogger("sglang_fl").removeHandler(handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def all_reduce_once(rank: int, world_size: int, port: int, without: int) -> float:
    """Add ones up over the default group, on every rank but one."""
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    if rank != without:
        dist.all_reduce(total)
    return total.item()


def use_a_group(rank: int, world_size: int, port: int, late: int, seconds: float, timeout: float) -> float:
    """Make a group of all ranks and add ones up over it; one rank gets there later, by its own host's doing."""
    import torch
    import torch.distributed as dist

    group = dist.new_group(list(range(world_size)), backend="flagcx", timeout=timedelta(seconds=timeout))
    if rank == late:
        time.sleep(seconds)
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    return total.item()


def join_another_world(rank: int, world_size: int, port: int, new_port: int, fault: str) -> tuple[str, str]:
    """A group beside the default one, made as SGLang's init_custom_process_group does, and after it one of the default one's."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _new_process_group_helper

    store = dist.TCPStore("127.0.0.1", new_port, world_size, rank == 0, timedelta(seconds=60))
    os.environ["FLAGCX_STAND_IN_FAULT"] = fault
    apart, _ = _new_process_group_helper(world_size, rank, [], "flagcx", store, group_name="weights", timeout=timedelta(seconds=60))
    del os.environ["FLAGCX_STAND_IN_FAULT"]
    group = dist.new_group(list(range(world_size)), backend="flagcx")
    return type(apart._get_backend(state["device"])).__name__, type(group._get_backend(state["device"])).__name__


def refused_batches(rank: int, world_size: int, port: int) -> tuple[list[str], float]:
    """Batches with a tensor that cannot be taken, on all ranks; what they raised, and the sum of everyone's 1 after them."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _coalescing_manager

    peer, strided, errors = (rank + 1) % world_size, torch.ones(4, 4)[:, :2], []
    try:
        dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.ones(4), peer), dist.P2POp(dist.irecv, strided, peer)])
    except ValueError as error:
        errors.append(str(error))
    try:
        with _coalescing_manager(async_ops=True):
            dist.all_gather_single(torch.empty(2 * world_size), torch.ones(2))
            dist.all_gather_single(torch.empty(3), torch.ones(2))
    except ValueError as error:
        errors.append(str(error))
    total = torch.ones(1)
    dist.all_reduce(total)
    return errors, total.item()


def make_groups(rank: int, world_size: int, port: int) -> None:
    """Groups of the first 2, 3 … ranks, over FlagCX and over the vendor's own backend."""
    import torch.distributed as dist

    state["flagcx"], state["native"], state["communicators"] = {}, {}, {}
    for size in range(2, world_size + 1):
        state["flagcx"][size] = dist.new_group(list(range(size)), backend="flagcx")
        state["native"][size] = dist.new_group(list(range(size)), backend=state["vendor"])
        if rank < size:
            state["communicators"][size] = state["setup"].communicator(state["flagcx"][size], state["device"])
