# SPDX-License-Identifier: Apache-2.0
"""Hides installed packages from a process and those that it starts, as on a machine that does not have them."""

from pathlib import Path

SITECUSTOMIZE = """
import importlib.machinery, importlib.metadata

MODULES, DISTRIBUTIONS = {modules!r}, {distributions!r}
find_spec, from_name = importlib.machinery.PathFinder.find_spec.__func__, importlib.metadata.Distribution.from_name.__func__

def find(cls, fullname, path=None, target=None):
    return None if fullname.partition(".")[0] in MODULES else find_spec(cls, fullname, path, target)

def named(cls, name):
    if name.lower().replace("_", "-") in DISTRIBUTIONS:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(cls, name)

importlib.machinery.PathFinder.find_spec = classmethod(find)
importlib.metadata.Distribution.from_name = classmethod(named)
"""


def hide(directory: Path, modules: tuple[str, ...], distributions: tuple[str, ...]) -> Path:
    """A directory that hides them once it stands on PYTHONPATH."""
    (directory / "sitecustomize.py").write_text(SITECUSTOMIZE.format(modules=modules, distributions=distributions))
    return directory
