# SPDX-License-Identifier: Apache-2.0
"""Which accelerator this machine has, and whether SGLang has a platform of its own for it.

Two answers to the same question. :func:`detect` asks PyTorch and is what the server uses; it
follows SGLang's own order of detection, so that a device SGLang knows stays SGLang's.
:func:`probe` reads only the driver's traces (device files, commands on PATH) and needs no PyTorch,
whose import takes seconds: the command line uses it.

Neither needs FlagGems. ``GEMS_VENDOR``, FlagGems's own variable, decides between vendors whose
PyTorch builds look alike. A chip that an installed package brings up, and that is there, goes before
what SGLang and PyTorch know of; ``vendor_platform`` has the packages' declarations.
"""

import glob
import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from .declared import known_vendors, platform_here, platform_problems
from .vendors import VENDORS, Vendor, canonical


@dataclass(frozen=True)
class Device:
    """An accelerator kind. ``in_tree`` is the name of SGLang's own platform for it, or None."""

    vendor: str
    device_type: str
    in_tree: str | None
    evidence: str

    @property
    def is_in_tree(self) -> bool:
        return self.in_tree is not None


def why_unusable(torch: ModuleType, device_type: str) -> str | None:
    """Why PyTorch cannot use a device type, or None. Whether there is such a device is another question."""
    try:
        torch.get_device_module(device_type)
    except RuntimeError:
        return (
            f"PyTorch has no device type {device_type!r}: is the chip's PyTorch extension installed, with an entry point "
            "torch.backends that PyTorch loads by itself?"
        )
    return None


def _device(vendor: Vendor, evidence: str) -> Device:
    return Device(vendor.name, vendor.device_type, vendor.in_tree, evidence)


def forced_vendor(environ: Mapping[str, str]) -> Vendor | None:
    """The vendor that ``GEMS_VENDOR`` names, if FlagOS or an installed package knows it."""
    return known_vendors().get(canonical(environ.get("GEMS_VENDOR", "")))


def vendor_problems(environ: Mapping[str, str], device: Device) -> list[str]:
    """What is wrong with the packages that declare a chip, and with ``GEMS_VENDOR`` on this device. Each must stop a server."""
    problems = platform_problems(environ)
    forced = forced_vendor(environ)
    if forced is not None and forced.name != device.vendor:
        problems.append(
            f"GEMS_VENDOR: {forced.name} ({forced.chip}) does not fit the device detected here, {device.vendor} ({device.evidence}); "
            f"unset GEMS_VENDOR, or install the PyTorch build and driver for {forced.chip}. "
            f"SGLANG_FL_PLATFORM={forced.name} uses its profile without its chip"
        )
    return problems


def _declared(environ: Mapping[str, str]) -> Device | None:
    """The chip that an installed package brings up, if it is there."""
    found = platform_here(environ)
    return _device(found[0].row(), found[1]) if found else None


def _cuda_vendor(torch: ModuleType, environ: Mapping[str, str]) -> tuple[Vendor, str]:
    """Whose chip stands behind ``torch.cuda``: several vendors answer to that name."""
    forced = forced_vendor(environ)
    if forced is not None and forced.device_type == "cuda":
        return forced, "GEMS_VENDOR"
    card = str(torch.cuda.get_device_name())
    words = card.lower()
    hip = torch.version.hip is not None
    if "ZW" in card:  # SGLang's own test for T-Head, ahead of everything else it asks of torch.cuda
        return VENDORS["thead"], f"card {card!r}"
    for vendor in VENDORS.values():
        if vendor.name == "thead" or (vendor.name in ("hygon", "amd")) != hip:
            continue
        if any(words.startswith(name) or f" {name}" in words for name in vendor.card_names):
            return vendor, f"card {card!r}"
    if hasattr(torch, "corex"):
        return VENDORS["iluvatar"], "torch.corex"
    lookalikes = ("hygon",) if hip else ("metax", "iluvatar", "kunlunxin")
    for name in lookalikes:
        for command in VENDORS[name].commands:
            if shutil.which(command):
                return VENDORS[name], f"card {card!r} and {command} on PATH"
    return VENDORS["amd" if hip else "nvidia"], f"card {card!r}"


def detect(torch: ModuleType | None = None, environ: Mapping[str, str] | None = None) -> Device:
    """Ask PyTorch which device there is.

    The CPU engine, which is asked for; then the chips that installed packages bring up; then SGLang's order
    (``sglang/srt/platforms/__init__.py``): SAIL, CUDA, NPU, ROCm, XPU, MUSA, MPS; then the devices SGLang does not
    know; then plain CPU.

    Args:
        torch: the module to ask (tests hand in their own).
        environ: read for ``SGLANG_USE_CPU_ENGINE`` and ``GEMS_VENDOR``.
    """
    if torch is None:
        import torch as real_torch

        torch = real_torch
    environ = os.environ if environ is None else environ

    if environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return Device("cpu", "cpu", "cpu", "SGLANG_USE_CPU_ENGINE=1")
    brought = _declared(environ)
    if brought is not None:
        return brought
    cuda = torch.cuda.is_available()
    hip = torch.version.hip is not None
    npu = hasattr(torch, "npu") and torch.npu.is_available()
    if cuda and not (hip and npu):
        return _device(*_cuda_vendor(torch, environ))
    if npu:
        return _device(VENDORS["ascend"], "torch.npu")
    if torch.xpu.is_available():
        return _device(VENDORS["intel"], "torch.xpu")
    if getattr(torch.version, "musa", None) is not None:
        if importlib.util.find_spec("torchada") is not None:
            return _device(VENDORS["mthreads"], "torch.version.musa")
        if hasattr(torch, "musa") and torch.musa.is_available():
            return Device("mthreads", "musa", None, "torch.musa without torchada, which SGLang's platform needs")
    if getattr(torch, "mps", None) is not None and torch.mps.is_available():
        return _device(VENDORS["apple"], "torch.mps")
    for vendor in VENDORS.values():
        if vendor.in_tree is None and vendor.device_type not in ("cuda", "cpu"):
            module = getattr(torch, vendor.device_type, None)
            if module is not None and module.is_available():
                return _device(vendor, f"torch.{vendor.device_type}")
    return _device(VENDORS["cpu"], "no accelerator that PyTorch can use")


def probe(environ: Mapping[str, str] | None = None) -> Device:
    """What the drivers on this machine say, without importing PyTorch. See :func:`detect`."""
    environ = os.environ if environ is None else environ
    if environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return Device("cpu", "cpu", "cpu", "SGLANG_USE_CPU_ENGINE=1")
    brought = _declared(environ)
    if brought is not None:
        return brought
    forced = forced_vendor(environ)
    if forced is not None and (any(map(glob.glob, forced.device_files)) or any(map(shutil.which, forced.commands))):
        return _device(forced, "GEMS_VENDOR")
    # Chips that imitate CUDA first: some of them install commands or files under NVIDIA's names too.
    for vendor in sorted(VENDORS.values(), key=lambda v: v.in_tree is not None):
        for pattern in vendor.device_files:
            if glob.glob(pattern):
                return _device(vendor, f"device file {pattern}")
        if not vendor.device_files:  # its driver has no file of its own
            for command in vendor.commands:
                if shutil.which(command):
                    return _device(vendor, f"{command} on PATH")
    return _device(VENDORS["cpu"], "no accelerator's device file under /dev")
