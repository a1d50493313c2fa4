# SPDX-License-Identifier: Apache-2.0
"""Finding libflagcx, loading it, and what is said where it cannot be used. One rank, in this process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flagcx_stand_in import REAL_FLAGCX, build, header
from torch.distributed import ReduceOp

from sglang_fl.distributed.communicator import CommunicatorFL, raw_stream_of
from sglang_fl.distributed.device_communicators.flagcx import DTYPES, PIECES, FlagCXError, FlagCXLibrary, Version
from sglang_fl.distributed.device_communicators.flagcx_files import LIBRARY, find_library, header_of

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
    with pytest.raises(FlagCXError, match=r"which FlagCX it is cannot be told .*flagcxHandleInit.*put its flagcx\.h"):
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
    with pytest.raises(FlagCXError, match=f"FlagCX {version} has another layout than sglang-fl knows.*{difference}"):
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
    with pytest.raises(ValueError, match="this communicator is for cpu, and the tensor is on meta"):
        communicator.all_reduce(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"contiguous tensors, not one of shape \[4, 2\] with strides \[4, 1\]"):
        communicator.all_reduce(torch.ones(4, 4)[:, :2])
    for call in (communicator.all_gather, communicator.reduce_scatter):
        with pytest.raises(ValueError, match=r"a tensor of torch.float32 cannot go into one of torch.bfloat16"):
            call(torch.ones(3, dtype=torch.bfloat16), torch.ones(3))
    with pytest.raises(ValueError, match=r"contiguous tensors, not one of shape"):
        communicator.exchange([(torch.ones(4, 4)[:, :2], 0)], [(torch.ones(4, 2), 0)])
    with pytest.raises(ValueError, match="all_gather of 3 elements by 1 ranks into 4"):
        communicator.all_gather(torch.ones(4), torch.ones(3))
    with pytest.raises(ValueError, match="reduce_scatter of 3 elements to 1 ranks of 4"):
        communicator.reduce_scatter(torch.ones(4), torch.ones(3))
    with pytest.raises(ValueError, match=r"sizes \[2\] do not divide 3 rows between 1 ranks"):
        communicator.all_gather(torch.ones(3), torch.ones(3), sizes=[2])
    with pytest.raises(ValueError, match=r"3 elements of torch.float32 cannot go into 3 of torch.float64"):
        communicator.all_to_all_single(torch.ones(3, dtype=torch.float64), torch.ones(3))


def test_a_transposed_tensor_is_reduced_where_it_lies(communicator: CommunicatorFL) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    communicator.all_reduce(tensor)
    assert torch.equal(tensor, torch.arange(6.0).reshape(2, 3).t())


def test_it_is_never_disabled(communicator: CommunicatorFL) -> None:
    communicator.disabled = True
    assert not communicator.disabled and communicator.available and bool(communicator)
    with communicator.change_state(enable=False):
        assert not communicator.disabled
    assert communicator.comm.value and communicator.rank == 0 and communicator.world_size == 1 and communicator.device == CPU


def test_a_call_that_fails_says_where(communicator: CommunicatorFL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGCX_STAND_IN_FAULT", "flagcxBroadcast@0#0=fail")
    told = r"flagcxBroadcast failed on rank 0 of the 1 of group 'alone' \(cpu\): flagcxInternalError \(3\)\. The ranks are out of step"
    with pytest.raises(FlagCXError, match=told):
        communicator.broadcast(torch.ones(3), 0)


def test_windows_need_a_library_that_has_them(communicator: CommunicatorFL) -> None:
    with pytest.raises(FlagCXError, match="lacks flagcxCommWindowRegister"):
        communicator.register_comm_window_raw(0, 4096)


def test_the_header_beside_the_real_library(checkout: Path) -> None:
    """Where this machine has the real FlagCX, its own header is the one that sglang-fl is written for."""
    real = os.environ.get(REAL_FLAGCX)
    if real is None:
        pytest.skip("FLAGCX_PATH named no FlagCX when the tests were started")
    found = header_of(find_library(real, {}))
    assert found is not None and found.problems == () and found.version is not None


def test_a_cpu_has_one_stream() -> None:
    assert raw_stream_of(CPU)() == 0
