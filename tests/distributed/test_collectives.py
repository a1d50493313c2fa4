# SPDX-License-Identifier: Apache-2.0
"""Every collective, over 2 to 4 real processes and the stand-in for libflagcx, against gloo."""

from collections.abc import Iterator
from pathlib import Path

import flagcx_collectives
import pytest
import torch
from flagcx_collectives import OPS, Case
from flagcx_ranks import Ranks, join_world, make_groups, ranks
from flagcx_stand_in import build, counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

REDUCED = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: What gloo moves too. float8 and others: test_binding.py
MOVED = (*REDUCED, torch.bool)


@pytest.fixture(scope="module")
def counters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counters")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, counters: Path) -> Iterator[Ranks]:
    flagcx = build(tmp_path_factory.mktemp("flagcx")).parents[2]
    with ranks([{"FLAGCX_PATH": str(flagcx), "FLAGCX_STAND_IN_COUNTERS": str(counters)}] * 4) as found:
        assert found.run(join_world) == ["ProcessGroupFlagCX"] * 4
        found.run(make_groups)
        yield found


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Case:
    size = draw(st.integers(2, 4))
    sizes = tuple(draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)))
    # Once in a while more than the stand-in moves at a time (256 KiB).
    tail = draw(st.sampled_from([(), (1,), (3,), (2, 5), (70_001,)]))
    return Case(
        size,
        sizes,
        tail,
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from(sorted(OPS))),
        draw(st.integers(0, size - 1)),
        draw(st.integers(0, 99)),
    )


def check(world: Ranks, name: str, case: Case) -> None:
    wrong = {rank: told for rank, told in enumerate(world.run(flagcx_collectives.run, name, case)) if told}
    assert not wrong


def several(count: int) -> settings:
    return settings(max_examples=count, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", ["all_reduce", "reduce", "reduce_scatter", "reduce_scatter_uneven", "asynchronous", "coalesced"])
def test_reductions(world: Ranks, name: str) -> None:
    @several(12)
    @given(cases(REDUCED))
    def agrees(case: Case) -> None:
        check(world, name, case)

    agrees()


@pytest.mark.parametrize(
    "name",
    [
        "broadcast",
        "all_gather",
        "all_gather_uneven",
        "all_gather_of_several",
        "all_to_all",
        "all_to_all_uneven",
        "gather_and_scatter",
        "around_the_ring",
        "objects",
    ],
)
def test_moves(world: Ranks, name: str) -> None:
    @several(12)
    @given(cases(MOVED))
    def agrees(case: Case) -> None:
        check(world, name, case)

    agrees()


def test_it_went_through_the_library(world: Ranks, counters: Path) -> None:
    """The last of this module: each rank's calls of each function, counted by the library itself."""
    names = ("AllReduce", "Reduce", "ReduceScatter", "AllGather", "Broadcast", "AlltoAll", "Send", "Recv", "GroupStart", "GroupEnd")
    found = counts(counters)
    assert len(found) == 4
    for counted in found.values():
        assert all(counted[f"flagcx{name}"] for name in names), counted
        assert counted["streamCopy"] == 1, "one handle of the one raw stream"
        assert counted["flagcxGroupStart"] == counted["flagcxGroupEnd"]
