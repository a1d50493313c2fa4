# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path

import pytest
from settings_loader import NVIDIA, Loader


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    return Loader(tmp_path / "settings.yaml")


@pytest.fixture
def on_nvidia(load: Loader) -> Loader:
    load.device = NVIDIA
    return load


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replaces the profile of plain CPU by a text."""

    def write(text: str) -> None:
        directory = tmp_path / "profiles"
        directory.mkdir(exist_ok=True)
        (directory / "cpu.yaml").write_text(text)
        monkeypatch.setattr("sglang_fl.config.loader.PROFILES", directory)

    return write
