# SPDX-License-Identifier: Apache-2.0
"""Facts about a machine without importing PyTorch: files of drivers, and what PyTorch is built for."""

import glob
import importlib.util
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from .vendors import Vendor


def device_file(patterns: Iterable[str]) -> str | None:
    """The first device file that is here, as evidence."""
    return next((f"device file {pattern}" for pattern in patterns if glob.glob(pattern)), None)


def command(names: Iterable[str]) -> str | None:
    """The first command that is on PATH, as evidence."""
    return next((f"{name} on PATH" for name in names if shutil.which(name)), None)


def hardware_evidence(vendor: Vendor) -> str | None:
    """Evidence that a vendor's chip is present, or None. A command counts only if its driver has no device files."""
    if vendor.machine == (platform.system(), platform.machine()):
        return f"{' on '.join(vendor.machine)}"
    if vendor.pci_vendor:
        return _display_device(vendor.pci_vendor)
    return device_file(vendor.device_files) if vendor.device_files else command(vendor.commands)


def _display_device(pci_vendor: str) -> str | None:
    """A device of a PCI vendor that renders or computes. There is such a device in most computers with an Intel CPU."""
    for file in glob.glob("/sys/class/drm/renderD*/device/vendor"):
        if Path(file).read_text().strip() == pci_vendor:
            return f"{file} is {pci_vendor}"
    return None


def torch_builds() -> frozenset[str]:
    """What the installed PyTorch is built for, of ``cuda``, ``hip`` and ``xpu``, read from its ``version.py``.

    If that cannot be read, all but ``xpu``: most computers have an Intel GPU that PyTorch does not use.
    """
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return frozenset({"cuda", "hip"})
    return frozenset(re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*['\"]", file.read_text(encoding="utf-8"), re.MULTILINE))


def why_unusable_by_torch(vendor: Vendor, builds: frozenset[str], environ: Mapping[str, str]) -> str | None:
    """Why PyTorch does not use a vendor's chip although it is here, or None if it may."""
    if vendor.torch_build and vendor.torch_build not in builds:
        return f"PyTorch is not built for {vendor.torch_build}"
    if vendor.torch_extension and importlib.util.find_spec(vendor.torch_extension) is None:
        return f"{vendor.torch_extension} is not installed"
    if vendor.device_type == "cuda" and environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']} hides it"
    return None
