# SPDX-License-Identifier: Apache-2.0
"""PlatformFL: the device as SGLang sees it.

On a device that SGLang knows, PlatformFL is SGLang's own platform with the moments added at which
sglang-fl does its work; on others it is an out-of-tree platform. SGLang imports this module in the
middle of its own import: nothing heavy may be imported at its top, ``sglang.srt.utils`` least of all.
"""

import importlib
import logging
import os
from itertools import pairwise
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.cuda import CudaDeviceMixin
from sglang.srt.platforms.device_mixin import DeviceCapability, DeviceMixin, PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from ..device import Device, detect
from ..device.declared import declared, known_vendors
from ..device.vendors import Vendor
from .declared import declared_bases

logger = logging.getLogger("sglang_fl")

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


class Identified:
    """A platform that knows whose chip it is for."""

    device: Device

    @property
    def vendor(self) -> Vendor:
        return known_vendors()[self.device.vendor]


class FLMoments(Identified):
    """The moments of a server's life at which SGLang asks its platform, and sglang-fl acts.

    It goes before every other class of a platform: what those do at the same moments comes with it, and not in its place.
    """

    def device_count(self) -> int:
        """How many devices PyTorch sees; 1 for a CPU."""
        return int(torch.get_device_module(self.device.device_type).device_count())

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """While arguments resolve, in the main process: check SGLang and the settings.

        SGLang lets through what is raised here, which ends the server, or reaches the caller of
        ``sgl.Engine``.

        Raises:
            SettingsError: a setting cannot be used.
            IncompatibleSGLang: this SGLang is not one that sglang-fl can work with.
        """
        from ..compat import check_platform
        from ..startup import resolve

        check_platform()
        resolve(self.device)
        super().apply_server_args_defaults(server_args)  # type: ignore[misc]

    def post_load_model(self, model: torch.nn.Module) -> None:
        """In every process that runs a model, once its weights are there: bind its layers."""
        super().post_load_model(model)  # type: ignore[misc]
        from ..bind import bind_model

        bind_model(model, self.device)

    def get_torch_distributed_backend_str(self) -> str:
        """The backend of SGLang's device groups; where FlagCX is chosen, this is when it is made ready in a worker."""
        from ..startup import settings_in_worker

        settings = settings_in_worker(self.device)
        native = str(super().get_torch_distributed_backend_str())  # type: ignore[misc]
        if settings.collective == "flagcx":
            from ..distributed import open_doors

            return open_doors(settings, self.device.device_type, native)
        return settings.dist_backend or native


class TorchDeviceMixin(DeviceMixin):
    """Device operations through ``torch.<device_type>``, for a device that SGLang does not know."""

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.device_type)

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(self._module.get_device_properties(device_id).total_memory)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        free, total = self._module.mem_get_info(device)
        return float(total - free)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        free, total = self._module.mem_get_info(device_id)
        return int(free), int(total)

    def set_device(self, device: torch.device) -> None:
        self._module.set_device(device)

    def get_device_name(self, device_id: int = 0) -> str:
        return str(self._module.get_device_name(device_id))

    def get_device_uuid(self, device_id: int = 0) -> str:
        uuid = getattr(self._module.get_device_properties(device_id), "uuid", None)
        return str(uuid) if uuid is not None else f"{self.device_type}:{device_id}"

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability | None:
        ask = getattr(self._module, "get_device_capability", None)
        found = ask(device_id) if ask is not None else None
        return DeviceCapability(*found) if isinstance(found, tuple) and len(found) == 2 else None

    def empty_cache(self) -> None:
        self._module.empty_cache()

    def synchronize(self) -> None:
        self._module.synchronize()

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return device is None or str(device) != "cpu"


class OutOfTree(Identified, SRTPlatform):
    """What every out-of-tree device needs from SGLang, from the vendors' table."""

    _enum = PlatformEnum.OOT
    # Triton kernels run wherever FlagGems does. Graph capture needs a graph runner that the vendor
    # brings; without one SGLang would take CUDA's.
    capabilities = PlatformCapabilities(supports_triton=True)

    def get_device(self, device_id: int | None = 0) -> str:
        # A string: SGLang splits it at ":". It asks with None as well.
        return self.device_type if device_id is None else f"{self.device_type}:{device_id}"

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        return torch.device(self.device_type, local_rank)

    def get_default_attention_backend(self) -> str:
        return self.vendor.attention or "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "inductor"

    def get_torch_distributed_backend_str(self) -> str:
        # What the user asks for goes before this, in FLMoments.
        return self.vendor.collective

    def get_torch_profiler_activity_str(self) -> str:
        return "CUDA" if self.device_type == "cuda" else "PrivateUse1"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        activity: torch.profiler.ProfilerActivity = getattr(torch.profiler.ProfilerActivity, self.get_torch_profiler_activity_str())
        return activity


class PlainCpu(OutOfTree, CpuDeviceMixin):
    """A CPU with PyTorch and nothing else. (SGLang's CPU engine needs AMX kernels built for it.)"""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int | None = 0) -> str:
        return "cpu"

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def get_compile_backend(self, mode: str | None = None) -> str:
        # Inductor's first compilation on a CPU takes longer than anything it then saves.
        return "eager"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        super().apply_server_args_defaults(server_args)
        # SGLang prefers its AMX backend on every x86 machine; this platform is for those without.
        if _given(server_args, "attention_backend") is None:
            if _given(server_args, "enable_deterministic_inference"):
                raise ValueError(
                    "--enable-deterministic-inference needs an attention backend that SGLang has made deterministic, "
                    "and there is none for a plain CPU; leave it out"
                )
            server_args.attention_backend = self.get_default_attention_backend()
        server_args.disable_custom_all_reduce = True  # it is a CUDA kernel; SGLang would try and complain
        _limit_kv_cache(server_args)
        _share_cores(server_args)


def _given(server_args: Any, name: str) -> Any:
    """What the user gave for an argument, None if nothing: SGLang has filled some in by now."""
    from sglang.srt.arg_groups.overrides import record_of

    raw = record_of(server_args._cfg)._raw_input
    return raw.get(name)


def _limit_kv_cache(server_args: Any) -> None:
    """Enough KV cache for the model's whole context, or for a few requests of a usual length.

    SGLang gives it most of a device's memory. A CPU's memory is also everyone else's, and zeroing
    most of it takes half a minute.
    """
    from sglang.srt.arg_groups.overrides import model_config_of, record_of

    if _given(server_args, "max_total_tokens") is None and _given(server_args, "mem_fraction_static") is None:
        context = model_config_of(record_of(server_args._cfg)).context_len
        server_args.max_total_tokens = max(context, _USUAL_TOKENS)


_USUAL_TOKENS = 32768
_BIND, _BOUND_BY_US = "SGLANG_CPU_OMP_THREADS_BIND", "_SGLANG_FL_CPU_OMP_THREADS_BIND"


def _share_cores(server_args: Any) -> None:
    """Give each rank of this machine its share of the cores.

    SGLang gives each rank a NUMA node, and stops where there are more ranks than nodes unless the
    user spells out the cores in SGLANG_CPU_OMP_THREADS_BIND.
    """
    if os.environ.get(_BIND) not in (None, "", os.environ.get(_BOUND_BY_US)):
        return
    os.environ.pop(_BIND, "")
    from sglang.srt.utils import get_cpu_ids_by_node

    world_size = server_args.tp_size * server_args.pp_size * server_args.dp_size
    nodes = [[int(cpu) for cpu in node.split(",")] for node in get_cpu_ids_by_node()]
    if world_size <= len(nodes):
        return
    ranks = max(1, world_size // server_args.nnodes)  # on this machine
    cpus = [cpu for node in nodes for cpu in node]
    starts = [rank * len(cpus) // ranks for rank in range(ranks + 1)]
    shares = [cpus[start : max(end, start + 1)] for start, end in pairwise(starts)]
    os.environ[_BIND] = os.environ[_BOUND_BY_US] = "|".join(",".join(map(str, share)) for share in shares)


def _in_tree_class(name: str) -> type[SRTPlatform]:
    module, cls = _IN_TREE[name]
    found: type[SRTPlatform] = getattr(importlib.import_module(module), cls)
    return found


def _out_of_tree_class(device_type: str) -> type[SRTPlatform]:
    if device_type == "cpu":
        return PlainCpu
    mixin = CudaDeviceMixin if device_type == "cuda" else TorchDeviceMixin
    return type("OutOfTreeDevice", (OutOfTree, mixin), {"_enum": PlatformEnum.OOT})


def platform_class(device: Device) -> type[SRTPlatform]:
    """The platform class for a device."""
    identity: dict[str, Any] = {"device": device, "__module__": __name__, "__doc__": __doc__}
    if device.in_tree is not None:
        return type("PlatformFL", (FLMoments, _in_tree_class(device.in_tree)), identity)
    identity |= {"device_name": device.vendor, "device_type": device.device_type, "_enum": PlatformEnum.OOT}
    base = _out_of_tree_class(device.device_type)
    brought = declared().platforms.get(device.vendor)
    return type("PlatformFL", (FLMoments, *((base,) if brought is None else declared_bases(brought, base))), identity)


PlatformFL = platform_class(detect())
