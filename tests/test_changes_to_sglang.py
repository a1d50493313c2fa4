# SPDX-License-Identifier: Apache-2.0
"""Changes to SGLang by vendors' folders and packages, and the stand-in for kernels that are not installed."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hide_packages import hide
from installed_packages import Packages
from sglang.srt.plugins.hook_registry import HookRegistry

from sglang_fl.cli.doctor.checks import why_not_importable
from sglang_fl.cli.doctor.diagnosis import diagnose
from sglang_fl.dispatch.backends import vendor
from sglang_fl.platform.changes import changes_made, load_changes, load_vendor_folder, packages_with_changes

PATCH = """
import sglang_fl.utils.suggest
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

def changed(original, *args, **kwargs):
    return original(*args, **kwargs)

HookRegistry.register("sglang.srt.utils.common.get_bool_env_var", changed, HookType.AROUND)
"""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's, with nothing in it; what is put in place is taken away again."""
    import sglang.srt.utils.common as common

    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(common, "get_bool_env_var", common.get_bool_env_var)


@pytest.mark.usefixtures("registry")
def test_a_vendors_folder_is_loaded_for_that_vendor_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mychip_of_a_test", "otherchip_of_a_test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "patch.py").write_text(PATCH)
        (tmp_path / name / "register_platform.py").touch()
    monkeypatch.setattr(vendor, "__path__", [*vendor.__path__, str(tmp_path)])
    load_vendor_folder("no_such_vendor")
    load_vendor_folder("mychip_of_a_test")
    folder = "sglang_fl.dispatch.backends.vendor.mychip_of_a_test"
    assert {name for name in sys.modules if "of_a_test" in name} >= {folder, f"{folder}.patch", f"{folder}.register_platform"}
    assert not [name for name in sys.modules if "otherchip_of_a_test" in name]
    target = "sglang.srt.utils.common.get_bool_env_var: around, by "
    assert changes_made() == [f"{target}{folder}.patch ({folder}.patch.changed), which failed: SGLang's log says why"], "not yet made"
    HookRegistry.apply_hooks()
    assert changes_made() == [f"{target}{folder}.patch ({folder}.patch.changed)"]


def test_the_packages_that_may_change_sglang_are_known_without_it(packages: Packages) -> None:
    module = packages.install("def register(): pass", {"sglang.srt.plugins": "{module}:register"})
    assert packages_with_changes() == [f"{module} (entry point {module})"]
    assert diagnose({}).changes == [f"{module} (entry point {module})"]
    assert diagnose({"SGLANG_FL_PATCHES": "0"}).changes == [f"{module} (entry point {module}), not loaded (SGLANG_FL_PATCHES=0)"]


@pytest.mark.usefixtures("registry")
def test_a_package_whose_changes_fail(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    raises = packages.install("def register():\n    raise RuntimeError('no driver')\n", {"sglang.srt.plugins": "{module}:register"})
    call = "HookRegistry.register('sglang.srt.utils.common.get_bool_env_vra', print, HookType.BEFORE)"
    code = f"from sglang.srt.plugins.hook_registry import HookRegistry, HookType\ndef register():\n    {call}\n"
    misspelt = packages.install(code, {"sglang.srt.plugins": "{module}:register"})
    monkeypatch.setattr("sglang.srt.plugins._plugins_loaded", False)
    monkeypatch.setattr("sglang_fl.load_plugin", lambda: None)
    failed, unknown = load_changes()
    assert failed.startswith(f"{raises} (entry point {raises}) changes nothing in SGLang: RuntimeError: no driver (")
    assert unknown.startswith(f"{misspelt} (entry point {misspelt}) cannot change sglang.srt.utils.common.get_bool_env_vra: AttributeError")
    assert unknown.endswith("; did you mean 'get_bool_env_var'?")
    assert load_changes() == [], "SGLang does it once in a process"


def test_where_sglang_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_importable() is None
    real = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr("sglang_fl.cli.doctor.checks.importlib.util.find_spec", lambda name: None if name == "triton" else real(name))
    what = why_not_importable()
    assert what is not None and what.endswith("imports triton, which is not installed") and "/sglang/srt/utils/common.py:" in what


def test_what_stands_in_for_kernels_that_are_not_installed(tmp_path: Path) -> None:
    code = """
from sglang_fl.platform.absent_packages import stand_in_for_absent_packages
from sglang_fl.device import Device
stand_in_for_absent_packages(Device("metax", "cuda", None, "a test"))
import torch
from sgl_kernel import silu_and_mul, weak_ref_tensor
from sgl_kernel.utils import is_arch_support_pdl
x = torch.ones(1)
assert weak_ref_tensor(x) is x and is_arch_support_pdl() is False
try:
    import sgl_kernel.allreduce
except ModuleNotFoundError:
    print("no allreduce")
silu_and_mul(x)
"""
    environ = {**os.environ, "PYTHONPATH": str(hide(tmp_path, ("sgl_kernel",), ("sglang-kernel",)))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stdout == "no allreduce\n"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("NotImplementedError: SGLang called sgl_kernel.silu_and_mul, and sgl_kernel is not installed: install")
