# SPDX-License-Identifier: Apache-2.0
"""All ranks use FlagCX or none does: three real processes, each with its own settings and library."""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from flagcx_ranks import (
    Outcome,
    RankFailed,
    Ranks,
    all_reduce_once,
    join_another_world,
    join_world,
    meet,
    ranks,
    refused_batches,
    use_a_group,
)
from flagcx_stand_in import build, header

from sglang_fl.utils.server import free_port

LIMIT = 3.0
NOT_CHOSEN: dict[str, str] = {}
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def flagcx(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkout with the stand-in and a header of 0.13.0."""
    root = tmp_path_factory.mktemp("flagcx")
    build(root)
    (root / "build" / "include").mkdir()
    (root / "build" / "include" / "flagcx.h").write_text(header("0.13.0"))
    return str(root)


@pytest.fixture(scope="module")
def world() -> Iterator[Ranks]:
    with ranks([{}] * 3) as found:
        yield found


def outcomes(world: Ranks, *environ: Mapping[str, str]) -> list[Outcome]:
    return world.run(meet, environ, free_port(), LIMIT)


def fell_back_together(found: list[Outcome]) -> str:
    """All three add up over gloo, in the world and in a group of it; returns the warning."""
    assert [outcome.error for outcome in found] == [""] * 3
    assert [outcome.backend for outcome in found] == ["ProcessGroupGloo"] * 3
    assert [outcome.total for outcome in found] == [9.0] * 3
    warnings = {outcome.warnings for outcome in found if outcome.warnings}
    assert len(warnings) == 1, "the ranks give one and the same reason"
    (warning,) = warnings.pop()
    assert warning.startswith("FlagCX is not used: ") and warning.endswith("All ranks use gloo instead.")
    return warning


def test_all_chose_it(world: Ranks, flagcx: str) -> None:
    by_backend = {"SGLANG_FL_DIST_BACKEND": "flagcx", "FLAGCX_PATH": flagcx}
    found = outcomes(world, {"FLAGCX_PATH": flagcx}, by_backend, {"FLAGCX_PATH": f"{flagcx}/build/lib"})
    assert [(outcome.backend, outcome.total, outcome.warnings, outcome.error) for outcome in found] == [
        ("ProcessGroupFlagCX", 9.0, (), "")
    ] * 3


@pytest.mark.parametrize("silent", [0, 2])
def test_a_rank_did_not_choose_it(world: Ranks, flagcx: str, silent: int) -> None:
    """It knows nothing of sglang-fl: plain gloo, also where it is the one that holds the store."""
    environ = [{"FLAGCX_PATH": flagcx}] * 3
    environ[silent] = NOT_CHOSEN
    found = outcomes(world, *environ)
    warning = fell_back_together(found)
    assert f"rank {silent} did not answer within 3 s" in warning
    assert f"FLAGCX_PATH={flagcx}" in warning and "SGLANG_FL_DIST_BACKEND=flagcx" in warning
    assert found[silent].warnings == ()


def test_a_rank_whose_library_lacks_a_symbol(world: Ranks, flagcx: str, tmp_path: Path) -> None:
    lacking = build(tmp_path, "-DWITHOUT_ALL_GATHER")
    found = outcomes(world, {"FLAGCX_PATH": flagcx}, {"FLAGCX_PATH": flagcx}, {"FLAGCX_PATH": str(tmp_path)})
    warning = fell_back_together(found)
    assert f"rank 2 on {HOST} (FLAGCX_PATH={tmp_path}): {lacking} lacks flagcxAllGather" in warning
    assert "rank 0" not in warning


def test_a_rank_without_the_library(world: Ranks, flagcx: str, tmp_path: Path) -> None:
    found = outcomes(world, {"FLAGCX_PATH": str(tmp_path / "gone")}, {"FLAGCX_PATH": flagcx}, {"FLAGCX_PATH": flagcx})
    assert f"rank 0 on {HOST} (FLAGCX_PATH={tmp_path / 'gone'}): there is no " in fell_back_together(found)


@pytest.mark.parametrize(("environ", "version"), [({}, "0.12.0"), ({"FLAGCX_STAND_IN_VERSION": "10100"}, "0.13.0")])
def test_another_version_on_a_rank(world: Ranks, flagcx: str, tmp_path: Path, environ: dict[str, str], version: str) -> None:
    build(tmp_path)
    (tmp_path / "build" / "include").mkdir()
    (tmp_path / "build" / "include" / "flagcx.h").write_text(header(version))
    found = outcomes(world, {"FLAGCX_PATH": flagcx}, {"FLAGCX_PATH": str(tmp_path), **environ}, {"FLAGCX_PATH": flagcx})
    warning = fell_back_together(found)
    assert f"rank 0 on {HOST} has FlagCX 0.13.0" in warning and f"rank 1 on {HOST} has {version}" in warning
    assert f"FLAGCX_PATH={tmp_path}" in warning


def test_a_variable_of_flagcx_that_differs(world: Ranks, flagcx: str) -> None:
    """It decides how ranks talk: they would wait for each other, each in its own way. Those that a node has for itself may differ."""
    own = {"FLAGCX_PATH": flagcx, "FLAGCX_SOCKET_IFNAME": "lo"}
    found = outcomes(world, {**own, "FLAGCX_USE_HETERO_COMM": "1"}, own, {**own, "FLAGCX_USE_HETERO_COMM": "1", "FLAGCX_DEBUG": "WARN"})
    message = f"FLAGCX_USE_HETERO_COMM must be the same on all ranks, and is '1' on ranks 0, 2 ({HOST}), not set on rank 1 ({HOST})"
    warning = fell_back_together(found)
    assert message in warning and "IFNAME" not in warning and "DEBUG" not in warning


@pytest.mark.parametrize(("function", "rank"), [("flagcxCommInitRank", 1), ("flagcxGetUniqueId", 0), ("flagcxAllReduce", 2)])
def test_the_initialization_fails_on_a_rank(world: Ranks, flagcx: str, function: str, rank: int) -> None:
    """The others' calls never return; they hear of it from the store, and before their time is up."""
    environ = {"FLAGCX_PATH": flagcx, "FLAGCX_STAND_IN_FAULT": f"{function}@{rank}#0=fail"}
    found = outcomes(world, *[environ] * 3)
    warning = fell_back_together(found)
    assert f"rank {rank} on {HOST} (FLAGCX_PATH={flagcx}): " in warning
    assert function in warning and "flagcxInternalError (3)" in warning
    assert max(outcome.seconds for outcome in found) < LIMIT


def test_it_hangs_on_a_rank(world: Ranks, flagcx: str) -> None:
    environ = {"FLAGCX_PATH": flagcx, "FLAGCX_STAND_IN_FAULT": "flagcxCommInitRank@1#0=hang"}
    warning = fell_back_together(outcomes(world, *[environ] * 3))
    assert f"rank 1 on {HOST} (FLAGCX_PATH={flagcx}): its communicator was not initialized within 2 s" in warning


def test_strict_on_one_rank_stops_all(world: Ranks, flagcx: str, tmp_path: Path) -> None:
    missing = {"FLAGCX_PATH": str(tmp_path / "gone")}
    found = outcomes(world, {"FLAGCX_PATH": flagcx}, {"FLAGCX_PATH": flagcx, "SGLANG_FL_STRICT": "1"}, missing)
    for outcome in found:
        assert outcome.error.startswith("FlagCXError: strict: FlagCX cannot be used: ")
        assert f"rank 2 on {HOST}" in outcome.error


def test_ranks_come_to_a_groups_first_use_when_they_can(flagcx: str) -> None:
    """One that loads its weights longer than the initialization of a communicator may take is waited for, as long as the group says."""
    with ranks([{"FLAGCX_PATH": flagcx}] * 2) as world:
        world.run(join_world, "flagcx", 1.0)
        assert world.run(use_a_group, 1, 2.5, 60.0) == [2.0] * 2
        with pytest.raises(
            RankFailed,
            match=r"FlagCXError: FlagCX's communicator of group '.*' could not be initialized: rank 1 did not use the",
        ):
            world.run(use_a_group, 1, 4.0, 1.0)


def test_refused_batches_and_a_group_with_ranks_of_another_world(flagcx: str) -> None:
    with ranks([{"FLAGCX_PATH": flagcx}] * 2) as world:
        assert world.run(join_world, "flagcx", LIMIT) == ["ProcessGroupFlagCX"] * 2
        for errors, total in world.run(refused_batches):
            assert total == 2.0, "no group was left open, in which it would wait for its end"
            assert errors[0].startswith("tensor 1 of the batch is not contiguous") and errors[1].startswith(
                "output_tensor has 3 elements, and 2 times the 2"
            )
        found = world.run(join_another_world, free_port(), "flagcxCommInitRank@1#0=fail")
        assert found == [("ProcessGroupGloo", "ProcessGroupFlagCX")] * 2


def test_a_rank_killed_in_the_middle(flagcx: str) -> None:
    """Who waits for it gets an error that names it; who does not is ended."""
    environ = {"FLAGCX_PATH": flagcx, "FLAGCX_STAND_IN_FAULT": "flagcxAllReduce@1#3=die"}  # the first is the trial
    with ranks([environ] * 3) as world:
        assert world.run(join_world) == ["ProcessGroupFlagCX"] * 3
        assert world.run(all_reduce_once, 99) == [3.0] * 3
        world.start(all_reduce_once, 2)
        assert world.result(2) == 1.0
        with pytest.raises(RankFailed, match=r"flagcxAllReduce failed on rank 0 .*flagcxRemoteError \(6\): rank 1 \(process \d+\) is gone"):
            world.result(0)
        world.processes[2].join(20)
        assert world.processes[2].exitcode == 1
        assert world.processes[1].exitcode == -9
