# SPDX-License-Identifier: Apache-2.0
"""The listing of SGLang's kernels: of a small package made up here, and of the installed SGLang, against its text."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from sglang_fl.cli.kernels import _OPERATORS
from sglang_fl.cli.model_layers import sglang_folder
from sglang_fl.kernels.listing import GRID, PLAIN, Kernel, kernels, remembered_kernels
from sglang_fl.kernels.reference import REFERENCES

SOURCE = {
    "kernels/ops/store.py": """
import triton
from sglang.kernels.jit.utils import load_jit
from .inner import scale

@triton.jit
def part(x):
    return x

@triton.autotune(configs=[], key=[])
@triton.jit
def store_kernel(x):
    part(x)

tuned = triton.heuristics({})(store_kernel)

def store(x):
    store_kernel[(1,)](scale(x))

def compiled(x):
    load_jit("file").run(x)

def can_store(x):
    return x is not None

class Store:
    def __call__(self, x):
        store(x)
""",
    "kernels/ops/inner.py": "import triton\n@triton.jit\ndef scale_kernel(x): ...\n\ndef scale(x):\n    return scale_kernel[(1,)](x)\n",
    "kernels/ops/__init__.py": "from .store import store as store_rows\n",
    "srt/layers/layernorm.py": """
from sglang.kernels.ops.store import compiled

class RMSNorm:
    def forward(self, x):
        return compiled(x)
""",
    "srt/pool.py": """
import triton
import sglang.kernels.ops.store as stores
from sglang.kernels.ops import store_rows
from sglang.kernels.ops.store import Store, can_store

if True:
    @triton.jit
    def own_kernel(x): ...

@triton.jit
def never_launched(x): ...

class Pool:
    def write(self, x):
        from sglang.kernels.ops.store import tuned
        kernel = tuned
        if can_store(x):
            store_rows(x)
        own_kernel[(2,)](x)
        return Store()

def move(x):
    stores.store_kernel[(1,)](x)
""",
}


@pytest.fixture
def made_up(tmp_path: Path) -> dict[str, Kernel]:
    for name, text in SOURCE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return {kernel.target: kernel for kernel in kernels(tmp_path, {"RMSNorm": "rms_norm"})}


def test_what_the_runtime_launches_and_calls(made_up: dict[str, Kernel]) -> None:
    store, inner = "sglang.kernels.ops.store:", "sglang.kernels.ops.inner:"
    behind_store = (f"{inner}scale_kernel", f"{store}store_kernel")
    assert {name: (found.call, found.launches) for name, found in made_up.items()} == {
        f"{store}tuned": (GRID, ()),
        f"{store}store_kernel": (GRID, ()),
        f"{store}store": (PLAIN, behind_store),
        f"{store}compiled": (PLAIN, ("load_jit",)),
        f"{store}Store": (PLAIN, behind_store),
        "sglang.srt.pool:own_kernel": (GRID, ()),
    }
    assert made_up[f"{store}Store"].through == (f"{inner}scale", f"{store}store")
    assert {name: [(str(site), site.where) for site in found.sites] for name, found in made_up.items()} == {
        f"{store}tuned": [("sglang/srt/pool.py:17", "Pool.write")],
        f"{store}store_kernel": [("sglang/srt/pool.py:24", "move")],
        f"{store}store": [("sglang/srt/pool.py:19", "Pool.write")],
        f"{store}compiled": [("sglang/srt/layers/layernorm.py:6", "RMSNorm.forward")],
        f"{store}Store": [("sglang/srt/pool.py:21", "Pool.write")],
        "sglang.srt.pool:own_kernel": [("sglang/srt/pool.py:20", "Pool.write")],
    }


def test_what_operators_cover_is_marked(made_up: dict[str, Kernel]) -> None:
    assert {found.name: found.operator for found in made_up.values() if found.operator} == {"compiled": "rms_norm"}


def test_it_is_made_once_and_again_when_a_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, text in SOURCE.items():
        (tmp_path / "sglang" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sglang" / name).write_text(text)
    first = remembered_kernels(tmp_path / "sglang", {})
    assert remembered_kernels(tmp_path / "sglang", {}) == first
    assert len(list((tmp_path / "cache/sglang-fl").iterdir())) == 1
    (tmp_path / "sglang/srt/pool.py").write_text("")
    assert [found.name for found in remembered_kernels(tmp_path / "sglang", {})] == ["compiled"]


@pytest.fixture(scope="module")
def installed() -> Mapping[str, Kernel]:
    return {kernel.target: kernel for kernel in remembered_kernels(sglang_folder(), _OPERATORS)}


def test_a_line_that_is_named_has_the_name(installed: Mapping[str, Kernel]) -> None:
    """Or another one, under which the file imports it."""
    files = {site.file for kernel in installed.values() for site in kernel.sites}
    texts = {file: (sglang_folder().parent / file).read_text().splitlines() for file in files}
    for kernel in installed.values():
        for site in kernel.sites:
            lines = texts[site.file]
            names = {kernel.name, *re.findall(rf"\b{kernel.name}\s+as\s+(\w+)", "\n".join(lines))}
            assert names & set(re.findall(r"\w+", lines[site.line - 1])), (kernel.target, site)


def test_every_launch_in_the_runtime_is_there(installed: Mapping[str, Kernel]) -> None:
    """Found by their looks: ``name[…](`` where the file has ``@triton.jit`` over the name, or imports it from ``sglang.kernels``."""
    launched = {(site.file, kernel.name) for kernel in installed.values() if kernel.call == GRID for site in kernel.sites}
    seen = 0
    for file in sorted((sglang_folder() / "srt").rglob("*.py")):
        text = file.read_text()
        own = set(re.findall(r"@triton\.jit(?:\([^)]*\))?\n(?:\s*@.*\n)*\s*def (\w+)", text))
        imported = re.findall(r"from sglang\.kernels[\w.]* import (?:\(([^)]*)\)|(.*))", text)
        own |= {name.strip() for group in imported for name in re.split(r"[,\n]", "".join(group)) if " as " not in name}
        for name in set(re.findall(r"^\s+(\w+)\[[^\]=]+\]\($", text, re.MULTILINE)) & own:
            assert (f"sglang/{file.relative_to(sglang_folder())}", name) in launched
            seen += 1
    assert seen > 80


def test_every_reference_stands_for_something_that_is_listed(installed: Mapping[str, Kernel]) -> None:
    listed = set(installed) | {name for kernel in installed.values() for name in kernel.through}
    listed |= {f"{s.file.removesuffix('.py').replace('/', '.')}:{s.where}" for kernel in installed.values() for s in kernel.sites}
    assert set(REFERENCES) - listed == set()
