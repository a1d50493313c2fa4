# SPDX-License-Identifier: Apache-2.0
"""SGLang's side: GroupCoordinator over FlagCX where it is chosen, and untouched where it is not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flagcx_coordinator import native_groups, serve_groups
from flagcx_ranks import Ranks, ranks
from flagcx_stand_in import build, counts
from sglang.srt.distributed.device_communicators.pynccl import PyNcclCommunicator
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.plugins.hook_registry import HookRegistry

import sglang_fl.distributed as distributed
from sglang_fl import startup
from sglang_fl.config import Settings
from sglang_fl.device import Device
from sglang_fl.distributed.device_communicators.flagcx_files import FlagCXError
from sglang_fl.platform import platform_class
from sglang_fl.utils.server import free_port

CPU = Device("cpu", "cpu", None, "test")


def methods() -> dict[str, object]:
    """All that SGLang's collectives are made of, by name."""
    found: dict[str, object] = {}
    for owner in (GroupCoordinator, PyNcclCommunicator, torch.distributed, torch.distributed.ProcessGroup):
        found |= {f"{owner.__name__}.{name}": value for name, value in vars(owner).items() if callable(value)}
    return found | {f"hook {target}": tuple(hooks) for target, hooks in HookRegistry._hooks.items() if hooks}


@pytest.mark.parametrize("settings", [Settings(), Settings(dist_backend="gloo"), Settings(dist_backend="nccl", flagcx_path="/opt/flagcx")])
def test_another_choice_leaves_sglang_as_it_is(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    before = methods()
    monkeypatch.setattr(startup, "_current", settings)
    assert platform_class(CPU)().get_torch_distributed_backend_str() == (settings.dist_backend or "gloo")
    after = methods()
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] is not after[name] and before[name] != after[name]] == []
    assert distributed._setup is None and "flagcx" not in torch.distributed.Backend.backend_list


@pytest.fixture(scope="module")
def counters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counters")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, counters: Path) -> Iterator[Ranks]:
    """Two ranks with SGLang imported, which takes half a minute."""
    flagcx = build(tmp_path_factory.mktemp("flagcx")).parents[2]
    environ = {"FLAGCX_PATH": str(flagcx), "FLAGCX_STAND_IN_COUNTERS": str(counters), "SGLANG_PLATFORM": "sglang_fl"}
    with ranks([environ] * 2) as found:
        yield found


def test_two_ranks_through_group_coordinator(world: Ranks, counters: Path) -> None:
    first, second = world.run(serve_groups, free_port())
    for found in (first, second):
        assert found["backend"] == "flagcx" and found["shared"]
        assert found["all_gatherv"] == [[0, 0], [1, 1], [1, 1]]
        assert found["all_gatherv_list"] == [[[0, 0], [1, 1], [1, 1]], [[0, 0], [10, 10], [10, 10]]]
        assert found["broadcast"] == [1, 1]
        assert found["in_place"] == found["out_of_place"] == [2] * 4
        assert found["never_disabled"] == [4] * 4
        assert found["tensor_dict"] == [1, 1]
        assert found["objects"] == [{"from": 0}]
    assert first["reduce_scatterv"] == [[2] * 3] and second["reduce_scatterv"] == [[2] * 3] * 2
    assert (first["all_to_all"], second["all_to_all"]) == ([0, 10], [1, 11])
    assert second["recv"] == [7] * 3 and second["sent_dict"] == [5] * 3
    for counted in counts(counters).values():
        assert counted["flagcxCommInitRank"] == 3, "the world at first, and both places of a group share one"
        # Graphs may hold those of the world and of tp: NCCL would wait for them when it frees a communicator.
        assert counted["flagcxCommDestroy"] == 1, "only that of the default group, which no GroupCoordinator has"
        assert counted["flagcxAlltoAll"] == 1 and counted["flagcxReduce"] == 2


def test_two_ranks_that_fell_back(world: Ranks) -> None:
    """Chosen, and no communicator on one of them: SGLang's groups are those that it makes by itself."""
    for found in world.run(native_groups, free_port(), {"FLAGCX_STAND_IN_FAULT": "flagcxCommInitRank@1#0=fail"}):
        assert found["communicator"] is None and found["total"] == [2, 2]


def test_symmetric_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_fl.distributed.setup import FlagCXSetup

    class Coordinator:
        world_size = 2

        def __init__(self, torch_distributed_backend: str, use_pynccl: bool):
            assert not use_pynccl

        def is_symmetric_memory_enabled(self) -> bool:
            return True

    setup = FlagCXSetup(Settings(flagcx_path="/opt/flagcx"), "cpu", "gloo")
    coordinator = Coordinator.__new__(Coordinator)
    with pytest.raises(FlagCXError, match=r"--enable-symm-mem .* or without FlagCX \(FLAGCX_PATH=/opt/flagcx\)"):
        setup.init_group_coordinator(Coordinator.__init__, coordinator, torch_distributed_backend="flagcx", use_pynccl=True)
