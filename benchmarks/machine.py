# SPDX-License-Identifier: Apache-2.0
"""The machine, the versions on it, and what its devices' memory holds."""

import os
import platform
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sglang_fl.device import probe
from sglang_fl.utils.packages import installed_version

#: Those whose versions must be the same for figures to be compared.
PACKAGES = ("sglang", "sglang-kernel", "torch", "triton", "flag_gems", "flashinfer-python")
_GIB = 1 << 30


def machine() -> dict[str, Any]:
    """Device, driver and CPU."""
    found: dict[str, Any] = {
        "vendor": probe().vendor,
        "device": None,
        "driver": None,
        "memory_gib": None,
        "cpu": platform.machine(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
    }
    if (nvidia := _nvml_device()) is not None:
        nvml, handle = nvidia
        found["device"] = nvml.nvmlDeviceGetName(handle)
        found["driver"] = nvml.nvmlSystemGetDriverVersion()
        found["memory_gib"] = nvml.nvmlDeviceGetMemoryInfo(handle).total / _GIB
    return found


def versions() -> dict[str, str]:
    """Package -> its version, of those that are installed."""
    return {package: found for package in ("sglang-fl", *PACKAGES, "transformers") if (found := installed_version(package)) is not None}


def commit() -> str | None:
    """The commit of this checkout, with a ``+`` if it has changes; None: it is no git checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_memory_used() -> float | None:
    """GiB in use on the device, by anyone; None: NVML does not say."""
    if (nvidia := _nvml_device()) is None:
        return None
    nvml, handle = nvidia
    return float(nvml.nvmlDeviceGetMemoryInfo(handle).used) / _GIB


def device_memory_of(pids: Collection[int]) -> float | None:
    """GiB that processes hold on the device; None: NVML does not say (in a container it often knows other ids)."""
    if (nvidia := _nvml_device()) is None:
        return None
    nvml, handle = nvidia
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return None
    held = [process.usedGpuMemory for process in running if process.pid in pids and process.usedGpuMemory is not None]
    return sum(held) / _GIB if held else None


def _nvml_device() -> tuple[Any, Any] | None:
    """NVML, and the first NVIDIA device that this process may use; None: there is none."""
    try:
        import pynvml
    except ImportError:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    try:
        pynvml.nvmlInit()
        by_id = first.isdecimal()
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first)) if by_id else pynvml.nvmlDeviceGetHandleByUUID(first)
    except pynvml.NVMLError:
        return None
