# SPDX-License-Identifier: Apache-2.0
"""On two NVIDIA GPUs and the real FlagCX: collectives against NCCL, graphs, streams, and a server of two ranks.

FLAGCX_PATH=/path/to/FlagCX NCCL_NVLS_ENABLE=0 python -m pytest tests/gpu/test_flagcx_on_gpu.py
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future

import flagcx_collectives
import psutil
import pytest
import torch
from e2e.conftest import Prompt, Running, make_prompts, off_by
from flagcx_collectives import OPS, Case
from flagcx_on_gpu import asynchronous_work, graphs, make_host_group
from flagcx_ranks import Ranks, join_world, make_groups, ranks
from flagcx_stand_in import REAL_FLAGCX
from served_on_gpu import TWO_GPUS, Way, recited, side_by_side

from sglang_fl.cli.demo_model import RECITAL, demo_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
    pytest.mark.skipif(REAL_FLAGCX not in os.environ, reason="FLAGCX_PATH names no FlagCX"),
]

REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_uneven", "asynchronous", "coalesced")
MOVES = (
    "broadcast",
    "all_gather",
    "all_gather_uneven",
    "all_gather_of_several",
    "all_to_all",
    "all_to_all_uneven",
    "gather_and_scatter",
    "around_the_ring",
    "objects",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8)
SIZES = ((8, 8), (5, 0), (0, 0), (1, 9))


@pytest.fixture(scope="module")
def flagcx() -> dict[str, str]:
    """The environment of every process here."""
    return {**TWO_GPUS, "FLAGCX_PATH": os.environ[REAL_FLAGCX], "SGLANG_FL_STRICT": "1"}


@pytest.fixture(scope="module")
def world(flagcx: dict[str, str]) -> Iterator[Ranks]:
    with ranks([flagcx] * 2) as found:
        assert found.run(join_world) == ["ProcessGroupFlagCX"] * 2
        found.run(make_groups)
        found.run(make_host_group)
        yield found


@pytest.mark.parametrize("name", [*REDUCTIONS, *MOVES])
def test_every_collective_gives_what_nccl_gives(world: Ranks, name: str) -> None:
    for number, dtype in enumerate((*DTYPES, torch.bool) if name in MOVES else DTYPES):
        for sizes in SIZES:
            case = Case(2, sizes, (3, 70_001) if number == 0 else (3,), dtype, sorted(OPS)[number % 4], number % 2, number)
            wrong = {rank: told for rank, told in enumerate(world.run(flagcx_collectives.run, name, case)) if told}
            assert not wrong, case


def test_graphs_replay_with_new_data(world: Ranks) -> None:
    for found in world.run(graphs):
        assert all(found.values()), found


def test_asynchronous_work_on_its_own_stream(world: Ranks) -> None:
    for found in world.run(asynchronous_work):
        assert all(found.values()), found


#: Servers, by what their collectives are and whether SGLang's own all-reduce takes the small ones.
WAYS = {"nccl": (False, False), "flagcx": (True, False), "nccl alone": (False, True), "flagcx alone": (True, True)}


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return make_prompts(demo_model(), torch.bfloat16)


@pytest.fixture(scope="module")
def servers(
    prompts: list[Prompt], flagcx: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Running]]]:
    ways = {
        name: Way(
            "flagcx" if over_flagcx else "nccl",
            flagcx if over_flagcx else TWO_GPUS,
            ("--disable-custom-all-reduce",) if alone else (),
        )
        for name, (over_flagcx, alone) in WAYS.items()
    }
    share = ("--tp", "2", "--max-total-tokens", "16384", "--mem-fraction-static", "0.8")
    with side_by_side(demo_model(), ways, "bfloat16", tmp_path_factory, share) as found:
        yield found


@pytest.mark.parametrize("name", WAYS)
def test_two_ranks_recite(servers: dict[str, Future[Running]], name: str) -> None:
    running = servers[name].result()
    assert recited(running) == RECITAL
    log = running.server.log.read_text()
    assert ("serves the collectives of 2 ranks" in log) == WAYS[name][0]
    assert "FlagCX is not used" not in log


@pytest.mark.parametrize(("ours", "theirs"), [("flagcx", "nccl"), ("flagcx alone", "nccl alone")])
def test_logprobs_are_those_of_nccl(servers: dict[str, Future[Running]], prompts: list[Prompt], ours: str, theirs: str) -> None:
    for prompt in prompts:
        pair = [servers[name].result().logprobs(prompt) for name in (ours, theirs)]
        assert off_by(*pair, prompt.bounds) <= 1


@pytest.mark.parametrize("name", ["nccl", "flagcx", "flagcx alone"])
def test_a_server_with_graphs_ends_when_it_is_asked_to(servers: dict[str, Future[Running]], name: str) -> None:
    """The last test: it leaves no server. NCCL frees no communicator of which there is a graph, and waits for ever."""
    process = servers[name].result().server.process
    assert process is not None
    children = psutil.Process(process.pid).children(recursive=True)
    started = time.monotonic()
    process.terminate()
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=30)
    print(f"{name}: ended {time.monotonic() - started:.1f} s after SIGTERM")
    assert not alive
