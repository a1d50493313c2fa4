# SPDX-License-Identifier: Apache-2.0
"""What each rank runs: SGLang's own GroupCoordinator over FlagCX, built and called as SGLang does."""

import os
from typing import Any


def serve_groups(rank: int, world_size: int, _: int, port: int) -> dict[str, Any]:
    """Build the world and a model-parallel group through the platform, and call what SGLang calls on them."""
    import torch
    import torch.distributed as dist
    from sglang.srt.distributed import parallel_state
    from sglang.srt.platforms import current_platform

    from sglang_fl import distributed, startup
    from sglang_fl.distributed.communicator import CommunicatorFL

    startup.resolve(current_platform.device)
    backend = parallel_state.get_default_distributed_backend("cpu")
    parallel_state.init_distributed_environment(world_size, rank, f"tcp://127.0.0.1:{port}", rank, backend)
    ranks = list(range(world_size))
    group = parallel_state.init_model_parallel_group([ranks], rank, dist.get_backend(), group_name="tp", use_custom_allreduce=False)
    apart = parallel_state.init_model_parallel_group([[r] for r in ranks], rank, dist.get_backend(), group_name="alone")
    assert apart.pynccl_comm is None
    communicator = group.pynccl_comm
    assert isinstance(communicator, CommunicatorFL) and isinstance(parallel_state._WORLD.pynccl_comm, CommunicatorFL)
    found: dict[str, Any] = {
        "backend": backend,
        "shared": communicator is distributed._setup.communicator(group.device_group, group.device),
    }

    mine = torch.full((rank + 1, 2), float(rank))
    sizes = [r + 1 for r in ranks]
    found["all_gatherv"] = torch.cat(group.all_gatherv(mine, sizes)).tolist()
    found["all_gatherv_list"] = [t.tolist() for t in group.all_gatherv([mine, mine * 10], sizes)]
    found["reduce_scatterv"] = group.reduce_scatterv(torch.ones(sum(sizes), 3), sizes=sizes).tolist()
    found["broadcast"] = group.broadcast(torch.full((2,), float(rank)), src=world_size - 1).tolist()
    given = torch.arange(float(world_size)) + 10 * rank
    taken = torch.empty_like(given)
    group._all_to_all_single(taken, given)
    found["all_to_all"] = taken.tolist()
    if rank == 0:
        group.send(torch.full((3,), 7.0), 1)
    elif rank == 1:
        found["recv"] = group.recv(torch.Size([3]), torch.float32, 0).tolist()
    group._all_reduce_in_place(in_place := torch.ones(4))
    found["in_place"] = in_place.tolist()
    found["out_of_place"] = group._all_reduce_out_place(torch.ones(4), "auto").tolist()
    found["tensor_dict"] = group.broadcast_tensor_dict({"a": torch.ones(2), "b": 5} if rank == 0 else None)["a"].tolist()
    found["objects"] = group.broadcast_object_list([{"from": rank}], src=0)
    if rank < 2:
        sent = group.send_tensor_dict({"x": torch.ones(3) * 5}, dst=1, async_send=True) if rank == 0 else None
        received = group.recv_tensor_dict(src=0) if rank == 1 else None
        for work in sent or ():
            work.work.wait()
        found["sent_dict"] = received and received["x"].tolist()
    communicator.disabled = True
    with communicator.change_state(enable=False):
        group._all_reduce_in_place(in_place)
    found["never_disabled"] = in_place.tolist()
    group.destroy()
    parallel_state.destroy_distributed_environment()
    return found


def native_groups(rank: int, world_size: int, _: int, port: int, environ: dict[str, str]) -> dict[str, Any]:
    """The world and a group of it, and the sum of everyone's 1."""
    import torch
    from sglang.srt.distributed import parallel_state
    from sglang.srt.platforms import current_platform

    from sglang_fl import startup

    os.environ.update(environ)
    startup.resolve(current_platform.device)
    backend = parallel_state.get_default_distributed_backend("cpu")
    parallel_state.init_distributed_environment(world_size, rank, f"tcp://127.0.0.1:{port}", rank, backend)
    group = parallel_state.init_model_parallel_group([list(range(world_size))], rank, backend, group_name="tp", use_custom_allreduce=False)
    found = {"communicator": group.pynccl_comm, "total": group.all_reduce(torch.ones(2)).tolist()}
    parallel_state.destroy_distributed_environment()
    return found
