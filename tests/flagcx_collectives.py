# SPDX-License-Identifier: Apache-2.0
"""What each rank runs: a collective over FlagCX and the same over gloo (on GPUs NCCL), on the same inputs.

A difference is an error. Inputs are small whole numbers, so that every order of adding gives the same bits in every dtype.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from flagcx_ranks import state
from torch.distributed import ReduceOp

OPS = {"sum": ReduceOp.SUM, "product": ReduceOp.PRODUCT, "max": ReduceOp.MAX, "min": ReduceOp.MIN}


@dataclass(frozen=True)
class Case:
    """One example. ``sizes`` are rows by rank, ``tail`` the shape of a row."""

    ranks: int
    sizes: tuple[int, ...]
    tail: tuple[int, ...]
    dtype: torch.dtype
    op: str
    root: int
    seed: int

    def tensor(self, rank: int, rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 8 + rank)
        low, high = (0, 3) if self.dtype in (torch.uint8, torch.bool) else (-2, 3)
        return torch.randint(low, high, (rows, *self.tail), generator=generator).to(self.dtype).to(state["device"])

    def new(self, rows: int) -> torch.Tensor:
        return torch.full((rows, *self.tail), 1, dtype=self.dtype, device=state["device"])


def _everyone(case: Case, rows: Callable[[int], int]) -> list[torch.Tensor]:
    """What every rank has put in."""
    mine = case.tensor(dist.get_rank(), rows(dist.get_rank()))
    found: list[Any] = [None] * case.ranks
    dist.all_gather_object(found, mine.cpu(), group=state["native"][case.ranks])
    return [tensor.to(mine.device) for tensor in found]


def _reduced(tensors: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    total = tensors[0].clone()
    for other in tensors[1:]:
        total = {
            "sum": lambda a, b: a + b,
            "product": lambda a, b: a * b,
            "max": torch.maximum,
            "min": torch.minimum,
        }[op](total, other)
    return total


def _pair(case: Case) -> tuple[Any, Any, Any]:
    return state["flagcx"][case.ranks], state["native"][case.ranks], state["communicators"][case.ranks]


def all_reduce(case: Case) -> Any:
    flagcx, native, communicator = _pair(case)
    mine = case.tensor(dist.get_rank(), case.sizes[0])
    by_native, by_backend, by_communicator = mine.clone(), mine.clone(), mine.clone()
    dist.all_reduce(by_native, op=OPS[case.op], group=native)
    dist.all_reduce(by_backend, op=OPS[case.op], group=flagcx)
    communicator.all_reduce(by_communicator, OPS[case.op])
    out_of_place = communicator.outplace_all_reduce(mine, op=OPS[case.op])
    into = torch.zeros_like(mine)
    assert communicator.outplace_all_reduce(mine, into, OPS[case.op]) is into
    assert torch.equal(mine, case.tensor(dist.get_rank(), case.sizes[0])), "out of place left its input alone"
    return by_native, by_backend, by_communicator, out_of_place, into


def reduce(case: Case) -> Any:
    flagcx, native, _ = _pair(case)
    by_native = case.tensor(dist.get_rank(), case.sizes[0])
    by_backend = by_native.clone()
    dist.reduce(by_native, case.root, op=OPS[case.op], group=native)
    dist.reduce(by_backend, case.root, op=OPS[case.op], group=flagcx)
    return (by_native, by_backend) if dist.get_rank() == case.root else (mine_alone(), mine_alone())


def mine_alone() -> torch.Tensor:
    return torch.zeros(0)


def broadcast(case: Case) -> Any:
    flagcx, native, communicator = _pair(case)
    mine = case.tensor(dist.get_rank(), case.sizes[0])
    copies = [mine.clone() for _ in range(3)]
    dist.broadcast(copies[0], case.root, group=native)
    dist.broadcast(copies[1], case.root, group=flagcx)
    communicator.broadcast(copies[2], case.root)
    return tuple(copies)


def all_gather(case: Case) -> Any:
    """Equal sizes: the list's form, the single tensor's, and the communicator's."""
    flagcx, native, communicator = _pair(case)
    rows = case.sizes[0]
    mine = case.tensor(dist.get_rank(), rows)
    results = []
    for group in (native, flagcx):
        outputs = [case.new(rows) for _ in range(case.ranks)]
        dist.all_gather(outputs, mine, group=group)
        results.append(torch.cat(outputs))
    single, by_communicator = case.new(rows * case.ranks), case.new(rows * case.ranks)
    dist.all_gather_single(single, mine, group=flagcx)
    communicator.all_gather(by_communicator, mine)
    return (*results, single, by_communicator)


def all_gather_uneven(case: Case) -> Any:
    flagcx, _, communicator = _pair(case)
    mine = case.tensor(dist.get_rank(), case.sizes[dist.get_rank()])
    outputs = [case.new(size) for size in case.sizes]
    dist.all_gather(outputs, mine, group=flagcx)
    gathered = case.new(sum(case.sizes))
    communicator.all_gather(gathered, mine, sizes=list(case.sizes))
    return torch.cat(_everyone(case, lambda rank: case.sizes[rank])), torch.cat(outputs), gathered


def all_gather_of_several(case: Case) -> Any:
    """As SGLang's all_gatherv calls it: groups inside a group."""
    communicator = state["communicators"][case.ranks]
    mine = case.tensor(dist.get_rank(), case.sizes[dist.get_rank()])
    one, two = case.new(sum(case.sizes)), case.new(sum(case.sizes))
    communicator.group_start()
    communicator.all_gather(one, mine, sizes=list(case.sizes))
    communicator.all_gather(two, mine, sizes=list(case.sizes))
    communicator.group_end()
    return torch.cat(_everyone(case, lambda rank: case.sizes[rank])), one, two


def reduce_scatter(case: Case) -> Any:
    flagcx, _, communicator = _pair(case)
    rank, rows = dist.get_rank(), case.sizes[0]
    mine = case.tensor(rank, rows * case.ranks)
    expected = _reduced(_everyone(case, lambda _: rows * case.ranks), case.op)[rank * rows : (rank + 1) * rows]
    single, by_list, by_communicator = case.new(rows), case.new(rows), case.new(rows)
    dist.reduce_scatter_single(single, mine, op=OPS[case.op], group=flagcx)
    dist.reduce_scatter(by_list, list(mine.chunk(case.ranks)), op=OPS[case.op], group=flagcx)
    communicator.reduce_scatter(by_communicator, mine, OPS[case.op])
    return expected, single, by_list, by_communicator


def reduce_scatter_uneven(case: Case) -> Any:
    flagcx, _, communicator = _pair(case)
    rank, total = dist.get_rank(), sum(case.sizes)
    mine = case.tensor(rank, total)
    expected = _reduced(_everyone(case, lambda _: total), case.op).split(case.sizes)[rank]
    by_list, by_communicator = case.new(case.sizes[rank]), case.new(case.sizes[rank])
    dist.reduce_scatter(by_list, list(mine.split(case.sizes)), op=OPS[case.op], group=flagcx)
    communicator.reduce_scatter(by_communicator, mine, OPS[case.op], sizes=list(case.sizes))
    return expected, by_list, by_communicator


def all_to_all(case: Case) -> Any:
    flagcx, native, communicator = _pair(case)
    rows = case.sizes[0] * case.ranks
    mine = case.tensor(dist.get_rank(), rows)
    by_native, by_backend, by_communicator = case.new(rows), case.new(rows), case.new(rows)
    dist.all_to_all_single(by_native, mine, group=native)
    dist.all_to_all_single(by_backend, mine, group=flagcx)
    communicator.all_to_all_single(by_communicator, mine)
    by_list = [case.new(case.sizes[0]) for _ in range(case.ranks)]
    dist.all_to_all(by_list, list(mine.chunk(case.ranks)), group=flagcx)
    return by_native, by_backend, by_communicator, torch.cat(by_list)


def all_to_all_uneven(case: Case) -> Any:
    flagcx, native, _ = _pair(case)
    rank = dist.get_rank()
    # Rank i sends sizes[(i + j) % n] rows to rank j.
    gives = [case.sizes[(rank + other) % case.ranks] for other in range(case.ranks)]
    mine = case.tensor(rank, sum(gives))
    by_native, by_backend = case.new(sum(gives)), case.new(sum(gives))
    dist.all_to_all_single(by_native, mine, output_split_sizes=gives, input_split_sizes=gives, group=native)
    dist.all_to_all_single(by_backend, mine, output_split_sizes=gives, input_split_sizes=gives, group=flagcx)
    return by_native, by_backend


def gather_and_scatter(case: Case) -> Any:
    flagcx, native, _ = _pair(case)
    rank, rows = dist.get_rank(), case.sizes[0]
    mine = case.tensor(rank, rows)
    results = []
    for group in (native, flagcx):
        gathered = [case.new(rows) for _ in range(case.ranks)] if rank == case.root else None
        dist.gather(mine, gathered, dst=case.root, group=group)
        back = case.new(rows)
        dist.scatter(back, gathered[::-1] if gathered else None, src=case.root, group=group)
        results.append(torch.cat([*(gathered or ()), back]))
    return tuple(results)


def around_the_ring(case: Case) -> Any:
    """send and recv, isend and irecv, and both as a batch; sizes differ by sender."""
    flagcx, native, communicator = _pair(case)
    rank = dist.get_rank()
    after, before = (rank + 1) % case.ranks, (rank - 1) % case.ranks
    mine = case.tensor(rank, case.sizes[rank])
    # The stand-in has no streams: more than it buffers blocks the sender.
    is_small = max(case.sizes) * math.prod(case.tail) * case.dtype.itemsize < 2**18
    results = []
    for group in (native, flagcx):
        blocking, batched, asynchronous = (case.new(case.sizes[before]) for _ in range(3))
        if rank % 2:
            dist.recv(blocking, before, group=group)
            dist.send(mine, after, group=group)
        else:
            dist.send(mine, after, group=group)
            dist.recv(blocking, before, group=group)
        if is_small:
            for work in (dist.isend(mine, after, group=group), dist.irecv(asynchronous, before, group=group)):
                work.wait()
        operations = [dist.P2POp(dist.irecv, batched, before, group=group), dist.P2POp(dist.isend, mine, after, group=group)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        results.append(torch.cat([blocking, batched, *([asynchronous] if is_small else ())]))
    direct = case.new(case.sizes[before])
    communicator.group_start()
    communicator.send(mine, after)
    communicator.recv(direct, before)
    communicator.group_end()
    return (*results, torch.cat([direct] * (3 if is_small else 2)))


def asynchronous(case: Case) -> Any:
    """Several under way at once, waited for in another order."""
    flagcx, native, _ = _pair(case)
    rows = case.sizes[0]
    mine = case.tensor(dist.get_rank(), rows)
    results = []
    for group in (native, flagcx):
        reduced, copied, gathered = mine.clone(), mine.clone(), [case.new(rows) for _ in range(case.ranks)]
        works = [
            dist.all_reduce(reduced, op=OPS[case.op], group=group, async_op=True),
            dist.broadcast(copied, case.root, group=group, async_op=True),
            dist.all_gather(gathered, mine, group=group, async_op=True),
            dist.barrier(group=group, async_op=True),
        ]
        for work in reversed(works):
            work.wait()
        results.append(torch.cat([reduced, copied, *gathered]))
    return tuple(results)


def coalesced(case: Case) -> Any:
    from torch.distributed.distributed_c10d import _coalescing_manager

    flagcx, native, _ = _pair(case)
    rank, rows = dist.get_rank(), case.sizes[0]
    one, two = case.tensor(rank, rows), case.tensor(rank + 10, rows)
    by_native, by_backend = [one.clone(), two.clone()], [one.clone(), two.clone()]
    for tensor in by_native:
        dist.all_reduce(tensor, op=OPS[case.op], group=native)
    with _coalescing_manager(group=flagcx):
        for tensor in by_backend:
            dist.all_reduce(tensor, op=OPS[case.op], group=flagcx)
    gathered = [case.new(rows * case.ranks) for _ in range(2)]
    with _coalescing_manager(group=flagcx, async_ops=True) as manager:
        for output, tensor in zip(gathered, by_native, strict=True):
            dist.all_gather_single(output, tensor, group=flagcx)
    manager.wait()
    scattered = [case.new(rows) for _ in range(2)]
    with _coalescing_manager(group=flagcx):
        for output, tensor in zip(scattered, gathered, strict=True):
            dist.reduce_scatter_single(output, tensor, op=ReduceOp.MAX, group=flagcx)
    return torch.cat(by_native * 3), torch.cat([*by_backend, *(t[:rows] for t in gathered), *scattered])


def objects(case: Case) -> Any:
    flagcx, native, _ = _pair(case)
    mine = {"rank": dist.get_rank(), "seed": case.seed}
    results = []
    for group in (native, flagcx):
        everyone: list[Any] = [None] * case.ranks
        dist.all_gather_object(everyone, mine, group=group)
        sent = [mine]
        dist.broadcast_object_list(sent, case.root, group=group)
        results.append(torch.tensor([v for found in [*everyone, *sent] for v in found.values()]))
    return tuple(results)


def run(rank: int, world_size: int, port: int, name: str, case: Case) -> str | None:
    """Run a collective by its name; what differs from the first result, or None."""
    if rank >= case.ranks:
        return None
    expected, *others = globals()[name](case)
    for place, other in enumerate(others):
        if expected.dtype != other.dtype or not torch.equal(expected, other):
            return f"result {place}: {other} is not {expected}"
    return None
