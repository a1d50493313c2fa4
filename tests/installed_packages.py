# SPDX-License-Identifier: Apache-2.0
"""Installed packages for tests: a module, and the metadata by which Python finds its entry points."""

import itertools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_fl.device import installed

_COUNT = itertools.count()


class Packages:
    """Installs packages for the length of a test."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.names: list[str] = []
        patch.syspath_prepend(str(directory))
        forget_platforms()

    def install(self, code: str, entries: Mapping[str, str], *, name: str = "chip") -> str:
        """A package whose module holds ``code``.

        Args:
            entries: group -> what is written behind ``name = ``; ``{module}`` in it is the module's name.

        Returns:
            The module's name; the package has the same, and so have its entry points.
        """
        module = f"{name}_{next(_COUNT)}_of_a_test"
        write_package(self.directory, module, code, {group: value.format(module=module) for group, value in entries.items()})
        forget_platforms()
        return module


def write_package(directory: Path, module: str, code: str, entries: Mapping[str, str]) -> None:
    """A module, and the metadata of a package of the same name with an entry point of that name in each group."""
    (directory / f"{module}.py").write_text(code)
    metadata = directory / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"[{group}]\n{module} = {value}\n" for group, value in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


def forget_platforms() -> None:
    installed.declared.cache_clear()
    installed._chips_here.cache_clear()


def pip_install(package: Path, target: Path) -> None:
    """Build and install a package as a user does, into a directory of its own that goes onto PYTHONPATH."""
    command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable]
    # What builds it and what it needs is in this environment; sglang-fl itself may be an editable checkout.
    subprocess.run([*command, "--no-deps", "--no-build-isolation", "--target", str(target), str(package)], check=True)
