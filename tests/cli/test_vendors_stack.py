# SPDX-License-Identifier: Apache-2.0
"""The install on a vendor's own PyTorch, as docs/vendors.md gives it: the PyTorch that is there stays, and nothing of CUDA comes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: A vendor's build, as far as an installer looks at it.
TORCH = "2.9.0+mychip"


def commands() -> list[str]:
    """Those of docs/vendors.md after the one that writes constraints.txt."""
    text = (ROOT / "docs" / "vendors.md").read_text(encoding="utf-8").partition("## On a vendor's own PyTorch")[2]
    return [line.partition("#")[0].strip() for line in re.findall(r"^uv pip install .*$", text.partition("\n## ")[0], re.MULTILINE)]


def test_the_pytorch_that_is_there_stays(tmp_path: Path) -> None:
    uv = [sys.executable, "-m", "uv"]
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(tmp_path / "venv")], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("# the vendor's\n")
    metadata = site / f"torch-{TORCH}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {TORCH}\n")
    (metadata / "RECORD").write_text(f"torch/__init__.py,,\n{metadata.name}/METADATA,,\n{metadata.name}/RECORD,,\n")
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "sglang_fl", checkout / "sglang_fl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs", checkout / "docs")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    (checkout / "constraints.txt").write_text(f"torch=={TORCH}\n")

    assert len(commands()) == 2
    for command in commands():
        arguments = command.split()[1:]
        done = subprocess.run([*uv, *arguments, "-q", "--python", str(python)], cwd=checkout, capture_output=True, text=True)
        if "Failed to fetch" in done.stderr or "dns error" in done.stderr:
            pytest.skip("needs the package index")
        assert done.returncode == 0, done.stderr
    assert (site / "torch" / "__init__.py").read_text() == "# the vendor's\n"
    names = {path.name.partition("-")[0].lower() for path in site.glob("*.dist-info")}
    assert {"sglang", "sglang_fl", "transformers", "torch"} <= names
    assert [path.name for path in site.glob("torch*.dist-info")] == [metadata.name]
    assert not {name for name in names if name.startswith(("nvidia", "flashinfer", "sgl_", "sglang_kernel", "triton", "cuda"))}

    done = subprocess.run([str(python), "-m", "sglang_fl", "doctor"], cwd=tmp_path, capture_output=True, text=True)
    found = re.search(
        r"SGLang cannot be imported: (\S+/sglang/srt/utils/common\.py):(\d+) imports triton, which is not installed", done.stdout
    )
    assert done.returncode == 1 and found, done.stdout + done.stderr
    assert "import triton" in Path(found[1]).read_text(encoding="utf-8").splitlines()[int(found[2]) - 1]
