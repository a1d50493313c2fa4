# SPDX-License-Identifier: Apache-2.0
"""What ``make dist`` builds, installed where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

CHECKOUT = Path(__file__).parents[2]
UV = [sys.executable, "-m", "uv"]
NO_PYTHON = shutil.ignore_patterns("__pycache__", ".*_cache")


def run(*command: str | Path, directory: Path) -> str:
    """A command's output. It finds no checkout, and no settings of ours."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=directory, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without what git ignores, after ``make dist``."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(CHECKOUT / "sglang_fl", source / "sglang_fl", ignore=NO_PYTHON)
    for name in ("pyproject.toml", "Makefile", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    run("make", "dist", f"VENV={sys.prefix}", directory=source)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; SGLang and PyTorch are this environment's, behind its own packages."""
    environment = tmp_path_factory.mktemp("environment") / "venv"
    run(*UV, "venv", "-q", "--python", sys.executable, environment, directory=environment.parent)
    run(*UV, "pip", "install", "-q", "--no-deps", "--python", environment / "bin/python", wheel, directory=environment.parent)
    (site,) = environment.glob("lib/python*/site-packages")
    # A path that a .pth file names is searched last, and .pth files in it are not read: the editable checkout is none of it.
    (site / "big_packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def test_everything_is_in_the_wheel(source: Path, wheel: Path) -> None:
    files = {str(path.relative_to(source)) for path in (source / "sglang_fl").rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {name for name in files if "/__pycache__/" not in name}
    template = "sglang_fl/dispatch/backends/vendor/template"
    assert {"sglang_fl/py.typed", "sglang_fl/config/nvidia.yaml", "sglang_fl/config/sample.yaml", f"{template}/pyproject.toml"} <= packed


def test_the_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    (sdist,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert (unpacked / "LICENSE").exists() and (unpacked / "CHANGELOG.md").exists()
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "again", directory=unpacked)
    (again,) = (tmp_path / "again").glob("*.whl")
    assert again.name == wheel.name
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_sglang_finds_the_installed_wheel(environment: Path, tmp_path: Path) -> None:
    code = """
import sglang_fl
from sglang.srt.platforms import current_platform
from sglang_fl.config import load_platform_config
print(sglang_fl.__file__, type(current_platform).__module__, type(current_platform).__qualname__, len(load_platform_config("nvidia")))
"""
    file, module, name, settings = run(environment / "bin/python", "-c", code, directory=tmp_path).splitlines()[-1].split()
    assert Path(file).is_relative_to(environment)
    assert (module, name) == ("sglang_fl.platform.platform_fl", "PlatformFL") and int(settings) > 0


def test_its_doctor_finds_no_problems(environment: Path, tmp_path: Path) -> None:
    found = json.loads(run(environment / "bin/sglang-fl", "doctor", "--json", directory=tmp_path))
    assert found["problems"] == []
    assert "No problems found." in run(environment / "bin/sglang-fl", "doctor", directory=tmp_path)


def test_its_template_makes_a_vendors_package(environment: Path, tmp_path: Path) -> None:
    run(environment / "bin/sglang-fl", "new-vendor", "fastchip", directory=tmp_path)
    (package,) = tmp_path.iterdir()
    template = CHECKOUT / "sglang_fl/dispatch/backends/vendor/template"
    wanted = {str(path.relative_to(template)) for path in template.rglob("*") if path.is_file()}
    wanted = {name.replace("mychip", "fastchip") for name in wanted if "__pycache__" not in name and "_cache/" not in name}
    assert {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()} == wanted


def test_pip_installs_it_beside_any_pytorch(wheel: Path, tmp_path: Path) -> None:
    """Resolved by the package index, without extras."""
    (tmp_path / "requirements.in").write_text(f"sglang-fl @ file://{wheel}\n")
    resolved = run(*UV, "pip", "compile", "-q", "--python", sys.executable, "requirements.in", directory=tmp_path)
    names = {line.split("==")[0].split(" @")[0] for line in resolved.splitlines() if line and not line.lstrip().startswith("#")}
    assert {"sglang-fl", "pyyaml"} <= names and not names & {"torch", "sglang", "triton", "numpy"}, sorted(names)
