# SPDX-License-Identifier: Apache-2.0
import os
import shutil
import signal
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from flagcx_stand_in import REAL_FLAGCX, remove_leftovers
from installed_packages import Packages, forget_platforms

from sglang_fl.dispatch.policy import PolicyManager

_PREFIXES = ("SGLANG_FL_", "SGLANG_FLAGGEMS_", "_SGLANG_FL_")
_NAMES = ("USE_FLAGGEMS", "FLAGCX_PATH", "GEMS_VENDOR", "SGLANG_PLATFORM", "SGLANG_PLUGINS", "SGLANG_USE_CPU_ENGINE")

# A slow machine is no failure.
hypothesis.settings.register_profile("sglang-fl", deadline=None)
hypothesis.settings.load_profile("sglang-fl")


def _settings_in_environment() -> list[str]:
    return [name for name in os.environ if name.startswith(_PREFIXES) or name in _NAMES]


def pytest_configure() -> None:
    """Tests, and the servers that they share, have settings of their own, whatever the shell has exported.

    Where the real FlagCX is, is no setting: the tests that need it ask under another name.
    """
    if "FLAGCX_PATH" in os.environ:
        os.environ[REAL_FLAGCX] = os.environ["FLAGCX_PATH"]
    for variable in _settings_in_environment():
        del os.environ[variable]

    # A shell starts what runs in the background with Ctrl-C ignored, and processes that tests start would ignore it too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # And a record of trials of their own.
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="sglang-fl-tests-")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What pytest-xdist keeps in one process: all end-to-end tests, and each other file.

    Engines that ran beside each other would take each other's time and memory; a file's tests share what was costly to make.
    On a GPU kernels share nothing costly, so each function of those files is by itself, and a quarter of the kinds of models.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.startswith("tests/e2e/"):
                return "e2e"
            if file.startswith("tests/gpu/") and file.endswith("kernels.py"):
                return nodeid.partition("[")[0]
            if file.endswith("test_model_classes_on_gpu.py"):
                return f"{file}, quarter {zlib.crc32(nodeid.encode()) % 4}"
            return file

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist the end-to-end tests begin at once: they take longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith("tests/e2e/"))


def pytest_unconfigure() -> None:
    remove_leftovers()
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread_beside_the_engines(request: pytest.FixtureRequest) -> None:
    """PyTorch's threads, one a core, would wait for each other and for the engines. The end-to-end tests of a process come first."""
    if "PYTEST_XDIST_WORKER" in os.environ and not request.node.nodeid.startswith("tests/e2e/"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are small, and threads that wait for each other are slow where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_settings_of_other_tests() -> Iterator[None]:
    """What a test leaves in the environment, by resolving settings there, ends with it."""
    yield
    for variable in _settings_in_environment():
        del os.environ[variable]


@pytest.fixture(scope="module", autouse=True)
def no_layers_of_other_files() -> Iterator[None]:
    """Layers that a file's tests bound are told of no policy that another's set, also where they wait for Python to collect them."""
    yield
    PolicyManager.get_instance()._listeners.clear()
    if bind := sys.modules.get("sglang_fl.bind"):
        bind._binder = None


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    """Installs packages of vendors for the test."""
    directory = tmp_path / "site"
    directory.mkdir()
    yield Packages(directory, monkeypatch)
    monkeypatch.undo()
    forget_platforms()
