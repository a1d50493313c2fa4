# SPDX-License-Identifier: Apache-2.0
"""Counting the kernels that are reached, in a process of its own: Python's profiler looks at all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from sglang_fl.kernels import trace

#: Under the name of a module of SGLang's, with Triton's own kernels; there is no device, so that a launch goes no further.
KERNELS = """
import triton

@triton.jit
def store_kernel(x): ...

@triton.autotune(configs=[triton.Config({})], key=[])
@triton.jit
def tuned_kernel(x): ...

def store(x):
    try:
        store_kernel[(1,)](x)
    except Exception as error:
        return error

def store_twice(x):
    store(x), store(x)
"""
PROGRAM = """
import importlib.util, os, sys, threading
from sglang_fl.kernels import trace
from sglang_fl.kernels.places import KernelHook

trace.start_if_asked()
spec = importlib.util.spec_from_file_location("sglang.kernels.ops.made_up", sys.argv[1])
room = importlib.util.module_from_spec(spec)
spec.loader.exec_module(room)
room.store(1)
room.store_twice(1)
thread = threading.Thread(target=room.store, args=(1,))
thread.start()
thread.join()
room.tuned_kernel[(1,)]
hook = KernelHook()
hook.own, hook.forward = room.tuned_kernel, lambda hook, grid, *args: None
hook[(1,)](1)
plain = KernelHook()
plain.own, plain.forward = room.store, lambda hook, grid, *args: None
plain(1)
plain.forward = None
plain(1)
if sys.argv[2:]:
    os._exit(9)
"""


def counts(folder: Path, *arguments: str) -> dict[str, int]:
    (folder / "kernels.py").write_text(KERNELS)
    environ = {**os.environ, trace.VARIABLE: str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder / "kernels.py"), *arguments], env=environ, text=True, capture_output=True
    )
    assert done.returncode == (9 if arguments else 0), done.stderr
    found = trace.total(folder)
    assert found == json.loads(next(folder.glob("*.json")).read_text())
    return {name.removeprefix("sglang.kernels.ops.made_up:"): count for name, count in found.items()}


def test_what_is_counted(tmp_path: Path) -> None:
    """Calls from elsewhere: not those of store by store_twice. Launches: all. What a hook replaces, and what it does not: once."""
    assert counts(tmp_path) == {"store": 4, "store_twice": 1, "store_kernel": 5, "tuned_kernel": 2}


def test_a_process_that_is_killed_has_written_what_it_reached(tmp_path: Path) -> None:
    assert set(counts(tmp_path, "killed")) == {"store", "store_twice", "store_kernel", "tuned_kernel"}


def test_nothing_is_counted_unless_it_is_asked_for() -> None:
    assert trace.VARIABLE not in os.environ
    trace.start_if_asked()
    assert sys.getprofile() is None
