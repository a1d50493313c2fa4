# SPDX-License-Identifier: Apache-2.0
"""The machine, the versions on it, and what its devices' memory holds."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sglang_fl.device import probe

_PACKAGES = ("sglang", "sglang-fl", "torch", "triton", "flag_gems", "sglang-kernel", "transformers", "flashinfer-python")
_GIB = 1 << 30


def machine() -> dict[str, Any]:
    """Device, driver and CPU."""
    device = probe()
    found: dict[str, Any] = {
        "vendor": device.vendor,
        "device": None,
        "driver": None,
        "memory_gib": None,
        "cpu": platform.machine(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
    }
    handle = _nvml_device()
    if handle is not None:
        import pynvml

        found["device"] = _text(pynvml.nvmlDeviceGetName(handle))
        found["driver"] = _text(pynvml.nvmlSystemGetDriverVersion())
        found["memory_gib"] = pynvml.nvmlDeviceGetMemoryInfo(handle).total / _GIB
    return found


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of this checkout, with a ``+`` if it has changes; None: it is no git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def device_memory_used() -> float | None:
    """GiB in use on the device, by anyone; None: NVML does not say."""
    handle = _nvml_device()
    if handle is None:
        return None
    import pynvml

    return float(pynvml.nvmlDeviceGetMemoryInfo(handle).used) / _GIB


def device_memory_of(pids: Collection[int]) -> float | None:
    """GiB that processes hold on the device; None: NVML does not say (in a container it often knows other ids)."""
    handle = _nvml_device()
    if handle is None:
        return None
    import pynvml

    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    held = [process.usedGpuMemory for process in running if process.pid in pids and process.usedGpuMemory is not None]
    return sum(held) / _GIB if held else None


def _nvml_device() -> Any:
    """The first NVIDIA device that this process may use, or None."""
    try:
        import pynvml
    except ImportError:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByIndex(int(first)) if first.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(first)
    except pynvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
