# SPDX-License-Identifier: Apache-2.0
"""PlatformFL: the class that SGLang makes its platform from.

SGLang imports this module in the middle of its own import: nothing heavy may be imported at the top of the files of
this folder, ``sglang.srt.utils`` least of all.
"""

import importlib
from typing import Any

from sglang.srt.platforms.interface import SRTPlatform

from ..device import Device, VendorPlatform, declared, detect
from ..utils.packages import last_line
from .declared import DeclaredAnswers, DeclaredHooks, describe, load_class
from .hooks import PlatformHooks
from .out_of_tree import OutOfTreeCuda, OutOfTreeDevice
from .plain_cpu import PlainCpu

#: SGLang's own platforms, by the name in the vendors' table.
_IN_TREE = {
    "cpu": ("sglang.srt.platforms.cpu", "CpuSRTPlatform"),
    "cuda": ("sglang.srt.platforms.cuda", "CudaSRTPlatform"),
    "rocm": ("sglang.srt.platforms.rocm", "RocmSRTPlatform"),
    "sail": ("sglang.srt.platforms.sail", "SailSRTPlatform"),
    "npu": ("sglang.srt.platforms.npu", "NPUSRTPlatform"),
    "xpu": ("sglang.srt.platforms.xpu", "XpuSRTPlatform"),
    "musa": ("sglang.srt.platforms.musa", "MusaSRTPlatform"),
    "mps": ("sglang.srt.platforms.mps", "MpsSRTPlatform"),
}


def platform_class(device: Device) -> type[SRTPlatform]:
    """The platform class for a device: the hooks, then what a package declares of the chip, then SGLang's class, or ours out of tree."""
    attributes: dict[str, Any] = {"device": device, "__module__": __name__, "__doc__": __doc__}
    base: type[SRTPlatform]
    if device.in_tree is not None:
        module, name = _IN_TREE[device.in_tree]
        base = getattr(importlib.import_module(module), name)
    else:
        attributes |= {"device_name": device.vendor, "device_type": device.device_type}
        base = {"cpu": PlainCpu, "cuda": OutOfTreeCuda}.get(device.device_type, OutOfTreeDevice)
    declaration = declared().platforms.get(device.vendor)
    if declaration is None:
        return type("PlatformFL", (PlatformHooks, base), attributes)
    return _declared_class(declaration, base, attributes | {"declaration": declaration, "load_error": None})


def _declared_class(declaration: VendorPlatform, base: type[SRTPlatform], attributes: dict[str, Any]) -> type[SRTPlatform]:
    """A class of the package that cannot be used is left out here, where nothing may be raised; a server stops with its error."""
    try:
        if declaration.platform_class is not None:
            return type("PlatformFL", (DeclaredHooks, load_class(declaration, "platform_class"), DeclaredAnswers, base), attributes)
    except RuntimeError as error:
        attributes["load_error"] = str(error)
    except TypeError as error:
        reason = f"platform_class {declaration.platform_class!r} cannot be combined with SGLang's: {last_line(error)}"
        attributes["load_error"] = describe(declaration, reason)
    return type("PlatformFL", (DeclaredHooks, DeclaredAnswers, base), attributes)


PlatformFL = platform_class(detect())
