# SPDX-License-Identifier: Apache-2.0
"""What each rank runs on a GPU: what a CPU has not, that is streams and graphs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from flagcx_ranks import state


def graphs(rank: int, world_size: int, port: int) -> dict[str, bool]:
    """Each operation captured once and replayed on new data; whether every replay was right, and took no memory."""
    communicator, device = state["communicators"][world_size], state["device"]
    n, rows = world_size, 8
    total = n * rows
    sizes = [rows - 1 if r == 0 else rows + 1 for r in range(n)] if n == 2 else [rows] * n
    given = torch.empty(total, 4, device=device)
    share, uneven = torch.empty(rows, 4, device=device), torch.empty(sizes[rank], 4, device=device)
    out = {
        name: torch.empty(total, 4, device=device)
        for name in ("all_reduce", "outplace", "all_gather", "gatherv", "all_to_all", "broadcast")
    }
    part, uneven_part, received = (
        torch.empty(rows, 4, device=device),
        torch.empty(sizes[rank], 4, device=device),
        torch.empty(total, 4, device=device),
    )

    def nested() -> None:
        communicator.group_start()
        communicator.all_gather(out["gatherv"], uneven, sizes=sizes)
        communicator.group_end()

    def around() -> None:
        communicator.group_start()
        communicator.send(given, (rank + 1) % n)
        communicator.recv(received, (rank - 1) % n)
        communicator.group_end()

    calls: list[Callable[[], Any]] = [
        lambda: communicator.all_reduce(out["all_reduce"].copy_(given)),
        lambda: communicator.outplace_all_reduce(given, out["outplace"]),
        lambda: communicator.all_gather(out["all_gather"], share),
        nested,
        lambda: communicator.reduce_scatter(part, given),
        lambda: communicator.reduce_scatter(uneven_part, given, sizes=sizes),
        lambda: communicator.all_to_all_single(out["all_to_all"], given),
        lambda: communicator.broadcast(out["broadcast"].copy_(given), n - 1),
        around,
    ]

    def everything() -> None:
        for call in calls:
            call()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()  # here: what the capture itself needs is there
        everything()
        after = torch.cuda.memory_allocated()
    handles = len(communicator._streams)
    found = {"no allocation": after == before}
    for turn in range(3):
        everyone = [torch.arange(total * 4, device=device, dtype=torch.float32).reshape(total, 4) % 7 + r + turn for r in range(n)]
        given.copy_(everyone[rank])
        share.copy_(everyone[rank][:rows])
        uneven.copy_(everyone[rank][: sizes[rank]])
        graph.replay()
        torch.cuda.synchronize()
        whole = sum(everyone)
        expected = {
            "all_reduce": (out["all_reduce"], whole),
            "outplace": (out["outplace"], whole),
            "all_gather": (out["all_gather"], torch.cat([e[:rows] for e in everyone])),
            "all_gatherv": (out["gatherv"], torch.cat([e[:s] for e, s in zip(everyone, sizes, strict=True)])),
            "reduce_scatter": (part, whole[rank * rows : (rank + 1) * rows]),
            "reduce_scatterv": (uneven_part, whole.split(sizes)[rank]),
            "all_to_all": (out["all_to_all"], torch.cat([e[rank * rows : (rank + 1) * rows] for e in everyone])),
            "broadcast": (out["broadcast"], everyone[n - 1]),
            "send and recv": (received, everyone[(rank - 1) % n]),
        }
        for name, (got, right) in expected.items():
            found[name] = found.get(name, True) and torch.equal(got, right)
    found["no new stream handle"] = len(communicator._streams) == handles
    return found


def asynchronous_work(rank: int, world_size: int, port: int) -> dict[str, bool]:
    """The current stream goes on while the group's own waits for the peer; wait() joins them, and frees nothing early."""
    group, device = state["flagcx"][world_size], state["device"]
    found = {"right": True}
    for turn in range(20):
        tensor = torch.full((1 << 20,), float(rank + turn), device=device)
        torch.cuda._sleep(1_000_000 * (1 + rank))  # what was queued before is waited for
        tensor += 1
        work = dist.all_reduce(tensor, group=group, async_op=True)
        scratch = [torch.full((1 << 20,), -1.0, device=device) for _ in range(4)]  # would take memory freed too early
        work.wait()
        expected = float(sum(r + turn + 1 for r in range(world_size)))
        found["right"] &= bool((tensor == expected).all())
        del scratch
    # NCCL connects two ranks on their first exchange, which stops both hosts.
    one, other = torch.ones(1, device=device), torch.empty(1, device=device)
    peer = 1 - rank
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, one, peer, group=group), dist.P2POp(dist.irecv, other, peer, group=group)]):
        work.wait()
    # Rank 0 sends before rank 1 has called recv; what rank 0 does meanwhile does not wait for it.
    if rank == 0:
        work = dist.isend(torch.full((1 << 24,), 3.0, device=device), 1, group=group)
        meanwhile = torch.ones(16, device=device) * 2
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
        found["meanwhile"] = meanwhile.sum().item() == 32
        dist.barrier(group=state["hosts"])
    else:
        dist.barrier(group=state["hosts"])
        received = torch.zeros(1 << 24, device=device)
        work = dist.irecv(received, 0, group=group)
    work.wait()
    if rank == 1:
        found["received"] = bool((received == 3).all())
    dist.barrier(group=group)
    return found


def make_host_group(rank: int, world_size: int, port: int) -> None:
    state["hosts"] = dist.new_group(list(range(world_size)), backend="gloo")
