# SPDX-License-Identifier: Apache-2.0
"""sglang-fl new-vendor: what it refuses, and that what it writes works at once, once it is installed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from installed_packages import Packages, pip_install

from sglang_fl.cli import main
from sglang_fl.config import load_settings
from sglang_fl.device import VENDORS, Device, VendorPlatform

Cli = Callable[..., "pytest.CaptureResult[str]"]
ROOT = Path(__file__).parents[2]
FILES = {
    "README.md",
    "pyproject.toml",
    "sglang_fl_fastchip/__init__.py",
    "sglang_fl_fastchip/backend.py",
    "sglang_fl_fastchip/changes.py",
    "sglang_fl_fastchip/impl/__init__.py",
    "sglang_fl_fastchip/impl/normalization.py",
    "sglang_fl_fastchip/platform.py",
    "sglang_fl_fastchip/profile.yaml",
    "sglang_fl_fastchip/register_ops.py",
    "tests/test_backend.py",
    "tests/test_platform.py",
}


def files_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def python(*arguments: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environ, cwd=cwd)


def test_it_writes_a_package_and_says_what_is_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(tmp_path)
    told = cli("new-vendor", "fastchip").out
    assert files_in(tmp_path / "sglang-fl-fastchip") == FILES
    assert all(file in told for file in FILES)
    assert "uv pip install -e 'sglang-fl-fastchip[test]'\n" in told and "sglang-fl check --vendor fastchip --quick" in told
    for file in FILES:
        text = (tmp_path / "sglang-fl-fastchip" / file).read_text(encoding="utf-8")
        assert "mychip" not in text.lower() and text.endswith("\n")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Fast-Chip", "not 'Fast-Chip'; did you mean 'fast_chip'?"),
        ("2fast", "a vendor's name must be a Python identifier in lower case, not '2fast'"),
        ("class", "not 'class'\n"),
        ("None", "not 'None'\n"),
        ("CUDA", "not 'CUDA'\n"),
        ("x_", "begins and ends with a letter or digit, not 'x_'; did you mean 'x'?"),
        ("_x", "begins and ends with a letter or digit, not '_x'; did you mean 'x'?"),
        ("__", "begins and ends with a letter or digit, not '__'"),
        ("chïp", "not 'chïp'; did you mean 'ch_p'?"),
        ("../up", "not '../up'; did you mean 'up'?"),
        ("", "not ''"),
        ("reference", "'reference' means something else in the settings"),
        ("template", "'template' means something else in the settings"),
        ("npu", "'npu' is another name for 'ascend'"),
        ("ascend", "'ascend' already has a backend (sglang_fl.dispatch.backends.vendor.ascend); choose another name"),
        ("nvidia", "'nvidia' already has a backend (sglang_fl.dispatch.backends.vendor.cuda); choose another name"),
        ("cpu", "'cpu' is served by the reference backend"),
    ],
)
def test_names_that_cannot_be(name: str, told: str, tmp_path: Path, cli: Cli) -> None:
    assert told in cli("new-vendor", name, str(tmp_path / "x"), code=2).err
    assert not (tmp_path / "x").exists()


def test_the_name_of_an_installed_package(tmp_path: Path, packages: Packages, cli: Cli) -> None:
    code = "from sglang_fl.vendor_platform import VendorPlatform as V\nPLATFORM = V(name='mine', device_type='x', commands=('no-tool',))"
    package = packages.install(code, {"sglang_fl.platform": "{module}:PLATFORM"})
    told = cli("new-vendor", "mine", str(tmp_path / "x"), code=2).err
    assert f"'mine' already has a platform ({package} (entry point {package}))" in told


def test_nothing_is_overwritten(tmp_path: Path, cli: Cli) -> None:
    def refused(directory: str) -> str:
        return cli("new-vendor", "fastchip", directory, code=2).err

    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    (full / "sub").mkdir(parents=True)
    file.write_text("mine")
    empty.mkdir()
    for taken in (full, file):
        assert f"{str(taken)!r} exists and is not an empty directory" in refused(str(taken))
    assert files_in(full) == set() and file.read_text() == "mine"
    assert "cannot be written: Not a directory" in refused(str(file / "below"))
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert "nowhere' exists" in refused(str(tmp_path / "nowhere"))
    assert "DIR is empty" in refused("")
    cli("new-vendor", "fastchip", str(empty))
    assert refused(str(empty))
    cli("new-vendor", "fastchip", str(tmp_path / "a" / "b"))


@pytest.mark.parametrize("name", ["fastchip", "a_name_of_some_length", "metax", "kunlunxin", "hygon", "mthreads"])
def test_what_it_writes_is_clean(name: str, tmp_path: Path) -> None:
    assert main(["new-vendor", name, str(tmp_path / "package")]) == 0
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "--no-cache", str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_vendor_that_sglang_has_a_platform_for_adds_to_it(tmp_path: Path, cli: Cli) -> None:
    told = cli("new-vendor", "mthreads", str(tmp_path / "package")).out
    assert "SGLang has its own platform for Moore Threads (musa); platform.py says what this package adds" in told
    assert files_in(tmp_path / "package") == {file.replace("fastchip", "mthreads") for file in FILES}
    platform = platform_in(tmp_path / "package", "mthreads")
    assert (platform.extends, platform.row().in_tree, platform.row().device_type) == ("musa", "musa", "musa")
    text = (tmp_path / "package" / "sglang_fl_mthreads" / "platform.py").read_text(encoding="utf-8")
    chosen = re.sub(r"^    # (?=[a-z_]+=)", "    ", text, flags=re.MULTILINE)
    assert set(platform_in(tmp_path / "package", "mthreads", chosen).classes()) == {
        "graph_runner", "piecewise_backend", "paged_allocator", "platform_class", "attention_backends['mthreads_attention']",
        "kv_pools['mha']", "kv_pools['mla']",
    }  # fmt: skip
    settings = load_settings({}, device=Device("mthreads", "musa", "musa", "a test"))
    own = (tmp_path / "package" / "sglang_fl_mthreads" / "profile.yaml").read_text(encoding="utf-8")
    assert own.count("[vendor:mthreads, sglang]") == len(settings.op_backends) and "flagos_faster: []" in own


def platform_in(directory: Path, name: str, change: str = "") -> VendorPlatform:
    file = directory / f"sglang_fl_{name}" / "platform.py"
    space = {"__file__": str(file)}
    exec(change or file.read_text(encoding="utf-8"), space)
    return space["PLATFORM"]  # type: ignore[return-value]


@pytest.mark.parametrize("name", [name for name, row in VENDORS.items() if row.in_tree is None and name != "cpu"])
def test_what_our_table_knows_of_a_chip_is_in_its_package(name: str, tmp_path: Path) -> None:
    main(["new-vendor", name, str(tmp_path / "package")])
    platform, row = platform_in(tmp_path / "package", name), VENDORS[name]
    assert platform.row() == row, "as the platform is without the package"


def test_every_choice_in_a_comment_can_be_made(tmp_path: Path) -> None:
    main(["new-vendor", "fastchip", str(tmp_path / "package")])
    text = (tmp_path / "package" / "sglang_fl_fastchip" / "platform.py").read_text(encoding="utf-8")
    chosen = re.sub(r"^    # (?=[a-z_]+=)", "    ", text, flags=re.MULTILINE)
    platform = platform_in(tmp_path / "package", "fastchip", chosen)
    every = set(VendorPlatform.__dataclass_fields__)
    assert {name for name in every if re.search(rf"^    {name}=", chosen, re.MULTILINE)} == every, "every field is shown"
    assert len(platform.classes()) == 10

    text = (tmp_path / "package" / "sglang_fl_fastchip" / "backend.py").read_text(encoding="utf-8")
    chosen = re.sub(r"^( *)# (?=[a-z_]+=|def |    )", r"\1", text, flags=re.MULTILINE)
    assert "\ndef why_unavailable(" in chosen and "\n    why_unavailable=" in chosen
    space: dict[str, Any] = {"__package__": "sglang_fl_fastchip"}
    exec(chosen, space)
    assert space["BACKEND"].implementations()[0].supported_dtypes == {"bfloat16", "float16"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A new package, and where it was installed."""
    directory = tmp_path_factory.mktemp("new")
    assert main(["new-vendor", "fastchip", str(directory / "package")]) == 0
    pip_install(directory / "package", directory / "site")
    return directory / "package", directory / "site"


def own_tests(package: Path, site: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *more, path=site, cwd=package)


def test_its_own_tests_pass_at_once_the_check_among_them(installed: tuple[Path, Path]) -> None:
    done = own_tests(*installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_its_own_test_of_the_check_can_fail(installed: tuple[Path, Path], tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(installed[0], package)
    kernel = package / "sglang_fl_fastchip" / "impl" / "normalization.py"
    kernel.write_text(kernel.read_text().replace("    hidden =", "    raise NotImplementedError('no kernel')\n    hidden ="))
    done = own_tests(package, installed[1], "-k", "check")
    assert done.returncode == 1 and "refused: NotImplementedError: no kernel" in done.stdout


def test_the_wrong_kernel_of_the_page_fails_and_the_right_one_passes(installed: tuple[Path, Path], tmp_path: Path) -> None:
    page = (ROOT / "docs/vendors.md").read_text(encoding="utf-8")
    kernel, right = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[:2]
    row = re.search(r'"silu_and_mul": Kernel\(.*?\),', page)
    shown = re.search(r"^(FAILED: silu_and_mul .*?) \(and .*\n  again: sglang-fl (check .*)$", page, re.MULTILINE)
    assert row and shown
    site = tmp_path / "site"
    shutil.copytree(installed[1], site)
    package = site / "sglang_fl_fastchip"
    backend = (package / "backend.py").read_text()
    assert backend.count('"rms_norm": Kernel(') == 1
    (package / "backend.py").write_text(backend.replace('"rms_norm": Kernel(', f'{row[0]}\n        "rms_norm": Kernel('))
    for code, found in ((kernel, shown[1]), (kernel.rpartition("    return")[0] + right, "PASSED")):
        (package / "impl" / "activation.py").write_text(code)
        done = python("-m", "sglang_fl", *shlex.split(shown[2]), path=site, cwd=tmp_path)
        assert found in done.stdout, done.stdout + done.stderr


def test_the_doctor_knows_the_chip(installed: tuple[Path, Path], tmp_path: Path) -> None:
    done = python("-m", "sglang_fl", "doctor", path=installed[1], cwd=tmp_path)
    assert "Platforms of installed packages: fastchip (sglang-fl-fastchip (entry point fastchip)): not detected" in done.stdout


def test_the_template_is_in_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "sglang_fl", source / "sglang_fl", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "uv", "build", "-q", "--wheel", "--no-build-isolation", "--python", sys.executable]
    subprocess.run([*command, "--out-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("sglang_fl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        shipped = [name for name in archive.namelist() if "/template/" in name]
    assert len(shipped) == len(FILES), "and no tool's cache"
    code = (
        "import sglang_fl, sys; print(sglang_fl.__file__); from sglang_fl.cli import main; sys.exit(main(['new-vendor', 'fastchip', 'x']))"
    )
    done = python("-c", code, path=tmp_path / "site", cwd=tmp_path)
    assert done.returncode == 0 and str(tmp_path / "site") in done.stdout
    assert files_in(tmp_path / "x") == FILES
