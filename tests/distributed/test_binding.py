# SPDX-License-Identifier: Apache-2.0
"""Finding libflagcx, loading it, and what is said where it cannot be used. One rank, in this process."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flagcx_stand_in import REAL_FLAGCX, build, header
from torch.distributed import ReduceOp

from sglang_fl.distributed.communicator import CommunicatorFL, raw_stream_of
from sglang_fl.distributed.device_communicators.flagcx import DTYPES, PIECES, FlagCXError, FlagCXLibrary, Version
from sglang_fl.distributed.device_communicators.flagcx_files import LIBRARY, find_library, header_of
from sglang_fl.distributed.process_group import ProcessGroupFlagCX

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flagcx")
    build(root)
    return root


@pytest.fixture(scope="module")
def library(checkout: Path) -> FlagCXLibrary:
    return FlagCXLibrary(find_library(str(checkout), {}))


@pytest.fixture
def communicator(library: FlagCXLibrary) -> Iterator[CommunicatorFL]:
    found = CommunicatorFL(library, library.init_rank(1, library.unique_id(), 0), 0, 1, CPU, "alone")
    yield found
    found.close(abort=False)


def add_header(root: Path, text: str) -> None:
    (root / "flagcx" / "include").mkdir(parents=True)
    (root / "flagcx" / "include" / "flagcx.h").write_text(text)


@pytest.mark.parametrize("part", ["", "build", "build/lib", f"build/lib/{LIBRARY}"])
def test_flagcx_path_may_be_the_checkout_or_the_library(checkout: Path, part: str) -> None:
    assert find_library(str(checkout / part), {}).samefile(checkout / "build" / "lib" / LIBRARY)


def test_the_loader_path(checkout: Path, tmp_path: Path) -> None:
    found = find_library(None, {"LD_LIBRARY_PATH": f"{tmp_path}:{checkout}/build/lib"})
    assert found == checkout / "build" / "lib" / LIBRARY
    with pytest.raises(FlagCXError, match=f"no {LIBRARY} in LD_LIBRARY_PATH \\({tmp_path}\\) .*set FLAGCX_PATH"):
        find_library(None, {"LD_LIBRARY_PATH": str(tmp_path)})


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FlagCXError, match=f"there is no '{tmp_path}/gone'"):
        find_library(str(tmp_path / "gone"), {})
    with pytest.raises(FlagCXError, match=f"looked for {tmp_path}/build/lib/{LIBRARY}, .*; build FlagCX there first"):
        find_library(str(tmp_path), {})


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / LIBRARY).write_text("no library")
    with pytest.raises(FlagCXError, match=f"{tmp_path}/{LIBRARY} cannot be loaded: "):
        FlagCXLibrary(tmp_path / LIBRARY)


def test_a_missing_symbol(tmp_path: Path) -> None:
    with pytest.raises(FlagCXError, match=r"lacks flagcxAllGather: it is not FlagCX 0.5 to 0.13"):
        FlagCXLibrary(build(tmp_path, "-DWITHOUT_ALL_GATHER"))


def test_the_version(library: FlagCXLibrary, tmp_path: Path) -> None:
    assert library.version == Version(10000, None, "flagcxDeviceHandleInit")
    add_header(tmp_path, header("0.13.0"))
    known = FlagCXLibrary(build(tmp_path)).version
    assert known == Version(10000, "0.13.0", "flagcxDeviceHandleInit")
    assert known.agrees(library.version) and not known.agrees(Version(10000, "0.14.0", "flagcxDeviceHandleInit"))


def test_releases_that_do_not_say_which_they_are(tmp_path: Path) -> None:
    """Before 0.13: the same header is the same release, another one is another."""
    silent = "".join(line for line in header().splitlines(keepends=True) if "FLAGCX_VERSION_" not in line)
    versions = []
    for name, text in (("one", silent), ("same", silent), ("other", silent + "flagcxResult_t flagcxMore();\n")):
        add_header(tmp_path / name, text)
        versions.append(FlagCXLibrary(build(tmp_path / name, "-DBEFORE_0_13")).version)
    one, same, other = versions
    assert one.agrees(same) and not one.agrees(other)
    assert str(one).startswith("before 0.13 (header ") and str(one) != str(other)


def test_before_0_13(tmp_path: Path) -> None:
    """Handles come in a group and ids from the library; without its header nobody knows how the group is laid out."""
    old = build(tmp_path, "-DBEFORE_0_13")
    with pytest.raises(FlagCXError, match=r"unknown FlagCX release .*flagcxHandleInit.*put its flagcx\.h"):
        FlagCXLibrary(old)
    add_header(tmp_path, header("0.12.0"))
    library = FlagCXLibrary(old)
    assert library.version.interface == "flagcxHandleInit"
    alone = CommunicatorFL(library, library.init_rank(1, library.unique_id(), 0), 0, 1, CPU, "alone")
    tensor = torch.arange(5.0)
    alone.all_reduce(tensor)
    assert tensor.tolist() == [0, 1, 2, 3, 4]
    alone.close(abort=False)


@pytest.mark.parametrize(
    ("version", "text", "difference"),
    [
        ("0.4.0", header("0.4.0", without="hostGetDevicePointer"), "struct flagcxDeviceHandle has streamCreate where hostGetDevicePointer"),
        ("0.14.0", header("0.14.0", unique_id_bytes=512), "FLAGCX_UNIQUE_ID_BYTES is 512, not 256"),
        ("0.14.0", header("0.14.0").replace("flagcxBfloat16 = 9", "flagcxBfloat16 = 11"), "flagcxBfloat16 is 11, not 9"),
    ],
)
def test_another_versions_layout(tmp_path: Path, version: str, text: str, difference: str) -> None:
    library = build(tmp_path)
    add_header(tmp_path, text)
    with pytest.raises(FlagCXError, match=f"FlagCX {version} has an unknown struct layout .*{difference}"):
        FlagCXLibrary(library)


def test_an_unknown_version_without_a_header(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGCX_STAND_IN_VERSION", "20000")
    with pytest.raises(FlagCXError, match=r"flagcxGetVersion says 20000.*put its flagcx\.h"):
        FlagCXLibrary(find_library(str(checkout), {}))


def test_one_handle_for_each_raw_stream(communicator: CommunicatorFL, library: FlagCXLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = FlagCXLibrary.make_stream_handle
    monkeypatch.setattr(FlagCXLibrary, "make_stream_handle", lambda self, raw: made.append(raw) or make(self, raw))
    for raw in (7001, 7002, 7001, 7002, 7001):
        communicator._raw_stream = lambda raw=raw: raw
        communicator.all_reduce(torch.ones(3))
        communicator.all_gather(torch.ones(3), torch.ones(3))
    assert made == [7001, 7002]
    assert len({library.streams[7001], library.streams[7002]}) == 2


def test_a_dtype_that_cannot_be_reduced(communicator: CommunicatorFL) -> None:
    with pytest.raises(TypeError, match=r"cannot reduce float8_e4m3fn; it reduces int8, uint8, int32, .*float64, bfloat16"):
        communicator.all_reduce(torch.zeros(4, dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"cannot reduce with .*BAND.*; it knows SUM, PRODUCT, MAX, MIN, AVG"):
        communicator.all_reduce(torch.ones(4), ReduceOp.BAND)
    with pytest.raises(TypeError, match="cannot reduce bool"):
        communicator.reduce_scatter(torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool), sizes=[4])
    communicator.all_reduce(torch.ones(4))  # no group was left open


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bool, torch.int16, torch.complex64, torch.uint16])
def test_any_dtype_can_be_moved(communicator: CommunicatorFL, dtype: torch.dtype) -> None:
    source = torch.arange(6).to(dtype)
    target = torch.zeros(6, dtype=dtype)
    communicator.all_gather(target, source)
    assert torch.equal(target.view(torch.uint8), source.view(torch.uint8))
    assert PIECES[dtype] == (DTYPES[torch.uint8], dtype.itemsize)


def test_what_cannot_be_used_is_named(communicator: CommunicatorFL) -> None:
    with pytest.raises(ValueError, match=r"^tensor is on meta, and this communicator is for cpu$"):
        communicator.all_reduce(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"^tensor is not contiguous: its shape is \[4, 2\], its strides are \[4, 1\]$"):
        communicator.all_reduce(torch.ones(4, 4)[:, :2])
    for call in (communicator.all_gather, communicator.reduce_scatter):
        with pytest.raises(ValueError, match=r"put_tensor is torch\.\w+, and \w+put_tensor is torch"):
            call(torch.ones(3, dtype=torch.bfloat16), torch.ones(3))
    with pytest.raises(ValueError, match=r"^the tensor sent to rank 0 is not contiguous: its shape"):
        communicator.exchange([(torch.ones(4, 4)[:, :2], 0)], [(torch.ones(4, 2), 0)])
    with pytest.raises(ValueError, match=r"^output_tensor has 4 elements, and 1 times the 3 of input_tensor are 3$"):
        communicator.all_gather(torch.ones(4), torch.ones(3))
    with pytest.raises(ValueError, match=r"^input_tensor has 3 elements, and 1 times the 4 of output_tensor are 4$"):
        communicator.reduce_scatter(torch.ones(4), torch.ones(3))
    for call in (communicator.all_gather, communicator.reduce_scatter):
        with pytest.raises(ValueError, match=r"^sizes \[2\] do not divide the 3 rows of \w+put_tensor between 1 ranks$"):
            call(torch.ones(3), torch.ones(3), sizes=[2])
    with pytest.raises(ValueError, match=r"^input_tensor is torch.float32, and output_tensor is torch.float64$"):
        communicator.all_to_all_single(torch.ones(3, dtype=torch.float64), torch.ones(3))


@pytest.fixture
def rank_1_of_2(library: FlagCXLibrary) -> CommunicatorFL:
    """A rank whose peer is not there; a call of FlagCX is an error."""
    without_peer = CommunicatorFL(library, 0, 1, 2, CPU, "pair")
    without_peer._functions = {name: _not_to_be_called(name) for name in library.functions}
    return without_peer


def _not_to_be_called(name: str) -> Callable[..., int]:
    def call(*arguments: object) -> int:
        raise AssertionError(f"{name}{arguments} was called")

    return call


FOUR, SIX, TRANSPOSED = torch.ones(4), torch.ones(6), torch.ones(3, 2).t()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        # With sizes: this rank's own tensor must be as long as its size says.
        (lambda c: c.all_gather(SIX, torch.ones(1), sizes=[3, 3]), "input_tensor has 1 elements, and sizes[1] gives it 3 of output_tensor"),
        (
            lambda c: c.all_gather(torch.ones(6, 2), torch.ones(1, 2), sizes=[4, 2]),
            "input_tensor has 2 elements, and sizes[1] gives it 4 of output_tensor",
        ),
        (
            lambda c: c.reduce_scatter(torch.ones(1), SIX, sizes=[3, 3]),
            "output_tensor has 1 elements, and sizes[1] gives it 3 of input_tensor",
        ),
        (lambda c: c.all_gather(SIX, SIX.half(), sizes=[0, 6]), "input_tensor is torch.float16, and output_tensor is torch.float32"),
        (lambda c: c.all_gather(SIX, FOUR, sizes=[-4, 10]), "sizes [-4, 10] do not divide the 6 rows of output_tensor between 2 ranks"),
        (lambda c: c.reduce_scatter(FOUR, SIX, sizes=[6]), "sizes [6] do not divide the 6 rows of input_tensor between 2 ranks"),
        (lambda c: c.outplace_all_reduce(FOUR, SIX), "in_tensor has 4 elements, and out_tensor has 6"),
        (lambda c: c.outplace_all_reduce(TRANSPOSED, torch.ones(2, 3)), "in_tensor has strides [1, 2], and out_tensor has [3, 1]"),
        (
            lambda c: c.all_gather(torch.ones(4, 3), TRANSPOSED),
            "input_tensor is not contiguous: its shape is [2, 3], its strides are [1, 2]",
        ),
        (
            lambda c: c.reduce_scatter(TRANSPOSED, torch.ones(4, 3)),
            "output_tensor is not contiguous: its shape is [2, 3], its strides are [1, 2]",
        ),
        (
            lambda c: c.all_to_all_single(TRANSPOSED, torch.ones(2, 3)),
            "output_tensor is not contiguous: its shape is [2, 3], its strides are [1, 2]",
        ),
        (lambda c: c.all_to_all_single(SIX, FOUR), "input_tensor has 4 elements, and output_tensor has 6"),
        (lambda c: c.all_to_all_single(torch.ones(3), torch.ones(3)), "input_tensor has 3 elements, which 2 ranks cannot share evenly"),
        (lambda c: c.broadcast(FOUR, 2), "src is rank 2, and the group has 2 ranks"),
        (lambda c: c.send(FOUR, -1), "dst is rank -1, and the group has 2 ranks"),
        (lambda c: c.recv(FOUR, 2), "src is rank 2, and the group has 2 ranks"),
        (lambda c: c.reduce(FOUR, 5), "dst is rank 5, and the group has 2 ranks"),
        (lambda c: c.all_gather_list([FOUR], FOUR), "outputs has 1 tensors, and the group has 2 ranks"),
        (lambda c: c.all_gather_list([FOUR, SIX], FOUR), "the tensor to gather has 4 elements, and outputs[1] has 6"),
        (lambda c: c.all_gather_list([FOUR.half(), FOUR], FOUR), "the tensor to gather is torch.float32, and outputs[0] is torch.float16"),
        (lambda c: c.reduce_scatter_list(FOUR, [FOUR.int(), FOUR]), "output is torch.float32, and tensors[0] is torch.int32"),
        (lambda c: c.reduce_scatter_list(SIX, [FOUR, FOUR]), "output has 6 elements, and tensors[1] has 4"),
        (lambda c: c.reduce_scatter_list(FOUR, [FOUR, FOUR, FOUR]), "tensors has 3 tensors, and the group has 2 ranks"),
        (lambda c: c.reduce_scatter_list(FOUR, [FOUR.to("meta"), FOUR]), "tensors[0] is on meta, and this communicator is for cpu"),
        (lambda c: c.exchange([(FOUR, 1)], [(SIX, 1)]), "the tensor sent to this rank has 4 elements, and the one that receives it has 6"),
        (
            lambda c: c.exchange([(FOUR, 1)], [(FOUR.half(), 1)]),
            "the tensor sent to this rank is torch.float32, and the one that receives it is torch.float16",
        ),
        (lambda c: c.exchange([(FOUR, 1)], []), "rank 1 sends 1 tensors to itself and receives 0"),
        (lambda c: c.exchange([(FOUR, 2)], []), "peer is rank 2, and the group has 2 ranks"),
    ],
)
def test_lengths_dtypes_layouts_and_ranks_are_checked_before_the_call(
    rank_1_of_2: CommunicatorFL, call: Callable[[CommunicatorFL], None], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(rank_1_of_2)


OPTIONS = SimpleNamespace(rootRank=1, asyncOp=False, reduceOp=ReduceOp.SUM)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.gather([[FOUR]], [FOUR], OPTIONS), "outputs has 1 tensors, and the group has 2 ranks"),
        (lambda g: g.gather([[SIX, FOUR]], [FOUR], OPTIONS), "the tensor to gather has 4 elements, and outputs[0] has 6"),
        (lambda g: g.scatter([FOUR], [[FOUR, FOUR, FOUR]], OPTIONS), "inputs has 3 tensors, and the group has 2 ranks"),
        (lambda g: g.scatter([FOUR], [[FOUR.int(), FOUR]], OPTIONS), "output is torch.float32, and inputs[0] is torch.int32"),
        (lambda g: g.alltoall([FOUR, FOUR], [FOUR], OPTIONS), "input_tensors has 1 tensors, and the group has 2 ranks"),
        (lambda g: g.alltoall([FOUR], [FOUR, FOUR], OPTIONS), "output_tensors has 1 tensors, and the group has 2 ranks"),
        (lambda g: g.all_to_all_single(FOUR, FOUR, [1, 1, 2], [2, 2], OPTIONS), "output has 3 tensors, and the group has 2 ranks"),
        (lambda g: g.all_to_all_single(torch.ones(5), FOUR, [], [2, 2], OPTIONS), "output has 5 rows, which 2 ranks cannot share evenly"),
        (lambda g: g.allgather([[FOUR, SIX]], [FOUR], OPTIONS), "the tensor to gather has 4 elements, and outputs[1] has 6"),
        (lambda g: g.reduce_scatter([FOUR], [[FOUR.int(), FOUR]], OPTIONS), "output is torch.float32, and tensors[0] is torch.int32"),
        (lambda g: g.broadcast([FOUR.to("meta")], OPTIONS), "tensor is on meta, and this communicator is for cpu"),
    ],
)
def test_the_process_group_checks_too(rank_1_of_2: CommunicatorFL, call: Callable[[ProcessGroupFlagCX], None], message: str) -> None:
    group = ProcessGroupFlagCX(1, 2, lambda device: rank_1_of_2, lambda communicator: None)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(group)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("flagcxBroadcast", lambda c: c.all_gather(FOUR.clone(), FOUR, sizes=[4])),
        ("flagcxReduce", lambda c: c.reduce_scatter(FOUR.clone(), FOUR, sizes=[4])),
        ("flagcxBroadcast", lambda c: c.all_gather_list([FOUR.clone()], FOUR)),
        ("flagcxReduce", lambda c: c.reduce_scatter_list(FOUR.clone(), [FOUR])),
    ],
)
def test_a_failure_leaves_no_group_open(
    communicator: CommunicatorFL, monkeypatch: pytest.MonkeyPatch, function: str, call: Callable[[CommunicatorFL], None]
) -> None:
    """In an open group a call only queues its work: the next one would return, and have done nothing."""
    monkeypatch.setenv("FLAGCX_STAND_IN_FAULT", f"{function}@0#0=fail")
    with pytest.raises(FlagCXError, match=f"{function} failed on rank 0"):
        call(communicator)
    monkeypatch.delenv("FLAGCX_STAND_IN_FAULT")
    gathered = torch.zeros(4)
    communicator.all_gather(gathered, FOUR)
    assert torch.equal(gathered, FOUR)


def test_a_failed_exchange_leaves_no_group_open(rank_1_of_2: CommunicatorFL) -> None:
    calls: list[str] = []
    results = {"flagcxGroupStart": 0, "flagcxGroupEnd": 0, "flagcxSend": 3}
    rank_1_of_2._functions = {name: lambda *arguments, name=name: calls.append(name) or results[name] for name in results}
    rank_1_of_2._library = SimpleNamespace(explain=lambda code, comm: "broken")
    with pytest.raises(FlagCXError, match="flagcxSend failed on rank 1 of the 2"):
        rank_1_of_2.exchange([(FOUR, 0)], [(SIX, 0)])
    assert calls == ["flagcxGroupStart", "flagcxSend", "flagcxGroupEnd"]


def test_a_transposed_tensor_is_reduced_where_it_lies(communicator: CommunicatorFL) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    communicator.all_reduce(tensor)
    assert torch.equal(tensor, torch.arange(6.0).reshape(2, 3).t())


def test_it_is_never_disabled(communicator: CommunicatorFL) -> None:
    communicator.disabled = True
    assert not communicator.disabled and communicator.available and bool(communicator)
    with communicator.change_state(enable=False):
        assert not communicator.disabled
    assert communicator.rank == 0 and communicator.world_size == 1 and communicator.device == CPU


def test_a_call_that_fails_says_where(communicator: CommunicatorFL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGCX_STAND_IN_FAULT", "flagcxBroadcast@0#0=fail")
    message = r"flagcxBroadcast failed on rank 0 of the 1 of group 'alone' \(cpu\): flagcxInternalError \(3\)\. The ranks are out of step"
    with pytest.raises(FlagCXError, match=message):
        communicator.broadcast(torch.ones(3), 0)


def test_the_header_beside_the_real_library(checkout: Path) -> None:
    """Where this machine has the real FlagCX, its own header is the one that sglang-fl is written for."""
    real = os.environ.get(REAL_FLAGCX)
    if real is None:
        pytest.skip("FLAGCX_PATH named no FlagCX when the tests were started")
    found = header_of(find_library(real, {}))
    assert found is not None and found.problems == () and found.version is not None


def test_a_cpu_has_one_stream() -> None:
    assert raw_stream_of(CPU)() == 0
