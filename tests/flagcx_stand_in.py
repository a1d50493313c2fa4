# SPDX-License-Identifier: Apache-2.0
"""Builds the stand-in for libflagcx with the machine's C compiler, and reads its counters."""

import os
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import psutil
import pytest

SOURCE = Path(__file__).parent / "distributed" / "flagcx_stand_in.c"
#: Where conftest.py keeps the FLAGCX_PATH that the tests were started with.
REAL_FLAGCX = "TEST_REAL_FLAGCX_PATH"
_RECORD = struct.Struct("48sQQ")


def build(directory: Path, *options: str) -> Path:
    """The library as it lies in FlagCX's checkout, ``directory``/build/lib/libflagcx.so; returns the file."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for libflagcx with")
    library = directory / "build" / "lib" / "libflagcx.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-shared", "-fPIC", "-O2", "-std=gnu11", *options, "-o", str(library), str(SOURCE), "-lrt"]
    subprocess.run(command, check=True)
    return library


def header(version: str = "0.13.0", *, without: str = "", unique_id_bytes: int = 256) -> str:
    """A flagcx.h with what sglang-fl reads in it."""
    from sglang_fl.distributed.device_communicators.flagcx_files import DATA_TYPES, DEVICE_HANDLE, REDUCE_OPS

    major, minor, patch = version.split(".")
    fields = "".join(f"  flagcxResult_t (*{name})();\n" for name in (*DEVICE_HANDLE, "streamSynchronize") if name != without)
    values = ",\n".join(f"  {name} = {value}" for name, value in {**DATA_TYPES, **REDUCE_OPS}.items())
    return (
        f"#define FLAGCX_VERSION_MAJOR {major}\n#define FLAGCX_VERSION_MINOR {minor}\n#define FLAGCX_VERSION_PATCH {patch}\n"
        f"#define FLAGCX_UNIQUE_ID_BYTES {unique_id_bytes}\ntypedef enum {{\n{values}\n}} all;\n"
        f"struct flagcxDeviceHandle {{\n{fields}}};\n"
    )


def counts(directory: Path) -> dict[int, Counter[str]]:
    """How often each process called each function, from FLAGCX_STAND_IN_COUNTERS."""
    found = {}
    for file in directory.iterdir():
        records = [_RECORD.unpack_from(file.read_bytes(), at) for at in range(0, os.path.getsize(file), _RECORD.size)]
        found[int(file.name)] = Counter({name.rstrip(b"\0").decode(): calls for name, calls, _ in records if calls})
    return found


def remove_leftovers() -> None:
    """Where ranks were to meet that were killed before they did."""
    for file in Path("/dev/shm").glob("flagcx-stand-in-*"):
        if not psutil.pid_exists(int(file.name.split("-")[3])):
            file.unlink(missing_ok=True)
