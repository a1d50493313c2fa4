# SPDX-License-Identifier: Apache-2.0
"""Which chip this machine has, and whether SGLang has a platform of its own for it.

Two functions give the same answer. :func:`detect` asks PyTorch and is what a server uses. :func:`probe` asks the drivers
and reads how PyTorch was built, without importing it, which would take seconds: it is what the command line uses. Both go
through the same list:

1. ``SGLANG_USE_CPU_ENGINE=1``: SGLang's own CPU platform.
2. A chip that SGLang does not know and an installed package declares, if it is here or GEMS_VENDOR names it (``installed.py``).
3. The rows of the vendors' table, in its order (``vendors.py``).
4. A plain CPU.

``GEMS_VENDOR``, FlagGems's own variable, then chooses between vendors of the same device type, whose PyTorch builds look
alike. Any other vendor in it is an error; see :func:`vendor_problems`.

The two can still differ where only PyTorch knows: a driver that is broken or too old for it, or a card of another vendor
behind NVIDIA's device files. Then :func:`detect` is right.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from .drivers import command, hardware_evidence, torch_builds, why_unusable_by_torch
from .installed import declared, known_vendors, platform_here, platform_problems
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


def detect(torch: ModuleType | None = None, environ: Mapping[str, str] | None = None) -> Device:
    """The chip that PyTorch uses on this machine.

    Args:
        torch: the module to ask (tests hand in their own).
        environ: read for ``SGLANG_USE_CPU_ENGINE`` and ``GEMS_VENDOR``.
    """
    if torch is None:
        import torch as real_torch

        torch = real_torch
    return _find(os.environ if environ is None else environ, lambda: _ask_torch(torch))


def probe(environ: Mapping[str, str] | None = None) -> Device:
    """The chip that PyTorch would use, as far as can be known without importing it. See :func:`detect`."""
    environ = os.environ if environ is None else environ
    return _find(environ, lambda: _ask_drivers(environ))


def vendor_problems(environ: Mapping[str, str], device: Device) -> list[str]:
    """What is wrong with the packages that declare a chip, and with ``GEMS_VENDOR`` on this device. Each must stop a server."""
    problems = platform_problems(environ, device.vendor)
    forced = _forced_vendor(environ)
    if forced is not None and forced.name != device.vendor:
        problems.append(
            f"GEMS_VENDOR: {forced.name} does not apply: the device here is {device.vendor} ({device.evidence}). If there is a "
            f"{forced.chip}, check its driver and its PyTorch build; if not, unset GEMS_VENDOR (SGLANG_FL_PLATFORM={forced.name} "
            "selects only its profile)"
        )
    return problems


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


def _find(environ: Mapping[str, str], ask: Callable[[], tuple[Vendor, str]]) -> Device:
    if environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return Device("cpu", "cpu", "cpu", "SGLANG_USE_CPU_ENGINE=1")
    package = platform_here(environ)
    if package is not None:
        return _device(package[0].row(), package[1])
    found, evidence = ask()
    forced = _forced_vendor(environ)
    if forced is not None and forced != found and _look_alike(forced, found):
        return _device(forced, "GEMS_VENDOR")
    return _device(found, evidence)


def _forced_vendor(environ: Mapping[str, str]) -> Vendor | None:
    """The vendor that ``GEMS_VENDOR`` names, if FlagOS or an installed package knows it."""
    return known_vendors().get(canonical(environ.get("GEMS_VENDOR", "")))


def _look_alike(forced: Vendor, found: Vendor) -> bool:
    """Whether PyTorch shows a chip of both vendors in the same way. SGLang's own CUDA and ROCm platforms also need its build."""
    return forced.device_type == found.device_type and (forced.in_tree is None or forced.torch_build == found.torch_build)


def _device(vendor: Vendor, evidence: str) -> Device:
    needed = vendor.in_tree_needs
    if needed and importlib.util.find_spec(needed) is None:
        return Device(vendor.name, vendor.device_type, None, f"{evidence}, without {needed}, which SGLang's platform needs")
    return Device(vendor.name, vendor.device_type, vendor.in_tree, evidence)


def _ask_torch(torch: ModuleType) -> tuple[Vendor, str]:
    """The first row whose device PyTorch can use."""
    card = _vendor_of_card(torch) if torch.cuda.is_available() else None
    for vendor in VENDORS.values():
        if card is not None and card[0] is vendor:
            return card
        if vendor.device_type not in ("cuda", "cpu") and _is_usable(torch, vendor):
            return vendor, f"torch.{vendor.device_type}"
    return VENDORS["cpu"], "no accelerator that PyTorch can use"


def _is_usable(torch: ModuleType, vendor: Vendor) -> bool:
    if vendor.name == "mthreads":
        if getattr(torch.version, "musa", None) is None:
            return False
        if importlib.util.find_spec(vendor.in_tree_needs) is not None:  # SGLang asks no more than this
            return True
    module = getattr(torch, vendor.device_type, None)
    return module is not None and bool(module.is_available())


def _vendor_of_card(torch: ModuleType) -> tuple[Vendor, str]:
    """Whose chip ``torch.cuda`` is: several vendors' builds use that name."""
    card = str(torch.cuda.get_device_name())
    evidence = f"card {card!r}"
    if "ZW" in card:  # SGLang's own test for T-Head
        return VENDORS["thead"], evidence
    build = "cuda" if torch.version.hip is None else "hip"
    vendors = [vendor for vendor in VENDORS.values() if vendor.torch_build == build and vendor.name != "thead"]
    words = card.lower()
    for vendor in vendors:
        if any(words.startswith(name) or f" {name}" in words for name in vendor.card_names):
            return vendor, evidence
    if hasattr(torch, "corex"):
        return VENDORS["iluvatar"], "torch.corex"
    for vendor in vendors:
        tool = command(vendor.commands) if vendor.in_tree is None else None
        if tool:
            return vendor, f"{evidence} and {tool}"
    return VENDORS["nvidia" if build == "cuda" else "amd"], evidence


def _ask_drivers(environ: Mapping[str, str]) -> tuple[Vendor, str]:
    """The first row whose hardware or driver is here and which PyTorch is built for.

    A command alone is weaker than device files: it may be part of a container image. WSL2 has nothing else.
    """
    builds = torch_builds()
    vendors = list(VENDORS.values())
    seen = [(vendor, hardware_evidence(vendor)) for vendor in vendors] + [(vendor, command(vendor.commands)) for vendor in vendors]
    unusable = []
    for vendor, evidence in seen:
        if evidence is None:
            continue
        reason = why_unusable_by_torch(vendor, builds, environ)
        if reason is None:
            return vendor, evidence
        unusable.append(f"{vendor.chip} ({evidence}): {reason}")
    return VENDORS["cpu"], "; ".join(["no accelerator that PyTorch can use", *unusable[:1]])


def has_triton(device: Device) -> bool:
    """Whether SGLang's Triton kernels run on a device. Not if a package declares a stand-in for Triton."""
    declaration = declared().platforms.get(device.vendor)
    if declaration is not None and "triton" in declaration.stand_ins:
        return False
    return device.in_tree not in (None, "cpu") or "supports_triton" in known_vendors()[device.vendor].capabilities
