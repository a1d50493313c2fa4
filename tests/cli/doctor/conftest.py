# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
from flagcx_stand_in import header

PLATFORMS = "sglang.srt.platforms"


@pytest.fixture
def platforms(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the names of the platform plugins that are installed."""

    def install(*names: str) -> None:
        found = tuple(EntryPoint(name, f"{name}:activate", PLATFORMS) for name in names)
        monkeypatch.setattr("sglang_fl.cli.doctor.checks.entry_points", lambda group: found if group == PLATFORMS else ())

    return install


@pytest.fixture
def flaggems(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sets whether the doctor finds FlagGems."""

    def install(found: bool) -> None:
        util = SimpleNamespace(find_spec=lambda name: object() if name != "flag_gems" or found else None)
        monkeypatch.setattr("sglang_fl.cli.doctor.checks.importlib", SimpleNamespace(util=util))

    return install


@pytest.fixture(autouse=True)
def all_is_well(platforms: Callable[..., None], flaggems: Callable[[bool], None]) -> None:
    platforms("sglang_fl")
    flaggems(True)


@pytest.fixture
def flagcx(tmp_path: Path) -> Path:
    """A checkout whose header is there; its library is none."""
    (tmp_path / "build" / "lib").mkdir(parents=True)
    (tmp_path / "build" / "include").mkdir()
    (tmp_path / "build" / "lib" / "libflagcx.so").write_text("no library")
    (tmp_path / "build" / "include" / "flagcx.h").write_text(header("0.13.0"))
    return tmp_path
