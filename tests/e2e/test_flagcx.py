# SPDX-License-Identifier: Apache-2.0
"""Two ranks of the real engine on a plain CPU, their collectives over the stand-in for libflagcx.

SGLang gives CPU tensors to torch.distributed before it asks for a device communicator: this is the backend ``flagcx``. What
CommunicatorFL does for GroupCoordinator is in tests/distributed.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from flagcx_stand_in import build, counts

from sglang_fl.cli.demo_model import RECITAL

from .conftest import Prompt, Running, off_by, serving

pytestmark = pytest.mark.e2e

#: The call that fails on rank 1, when the other tests of this module are done.
FAILING = 2500


@pytest.fixture(scope="module")
def counters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counters")


@pytest.fixture(scope="module")
def running(model: Path, native_logprobs: list[list[float]], counters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    flagcx = build(tmp_path_factory.mktemp("flagcx")).parents[2]
    environ = {
        "FLAGCX_PATH": str(flagcx),
        "FLAGCX_STAND_IN_COUNTERS": str(counters),
        "FLAGCX_STAND_IN_FAULT": f"flagcxAllReduce@1#{FAILING}=fail",
    }
    with serving(model, tmp_path_factory.mktemp("flagcx-server"), "--tp", "2", environ=environ) as found:
        yield found


def test_the_recital_is_exact(running: Running, counters: Path) -> None:
    before = counts(counters)
    assert running.recite().json()["choices"][0]["message"]["content"] == RECITAL
    after = counts(counters)
    assert len(after) == 2, "both ranks, and no process else"
    for process, counted in after.items():
        asked = counted - before[process]
        # Three layers, two all-reduces in each, and one of the embeddings: at every one of its 149 tokens.
        assert asked["flagcxAllReduce"] >= 149 * 7 and asked["flagcxAllGather"] >= 149, asked
        assert counted["streamCopy"] == 1
    assert "FlagCX of unknown release (flagcxGetVersion 10000, flagcxDeviceHandleInit) serves the collectives of 2 ranks" in (
        running.server.log.read_text()
    )


def test_logprobs_agree_with_one_rank(running: Running, prompts: list[Prompt], native_logprobs: list[list[float]]) -> None:
    for prompt, native in zip(prompts, native_logprobs, strict=True):
        assert off_by(running.logprobs(prompt), native, prompt.bounds) <= 1


def test_a_communicator_error_ends_the_server_with_its_message(running: Running, counters: Path) -> None:
    """The last test of this module: it leaves no server."""
    assert max(counted["flagcxAllReduce"] for counted in counts(counters).values()) < FAILING
    children = psutil.Process(running.server.pid).children(recursive=True)
    with pytest.raises(requests.RequestException):
        for _ in range(20):
            running.recite()
    assert running.server.process is not None
    started = time.monotonic()
    assert running.server.process.wait(timeout=60) != 0
    print(f"ended after {time.monotonic() - started:.1f} s")
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    log = running.server.log.read_text()
    assert "FlagCX: flagcxAllReduce failed on rank 1 of the 2 of group 'tp:0' (cpu): " in log
    assert "flagcxInternalError (3). The ranks are out of step, so this server must end." in log
