# SPDX-License-Identifier: Apache-2.0
"""Platforms for devices that SGLang does not know, or takes for another one."""

from functools import cached_property
from typing import Any

import torch
from sglang.srt.platforms.cuda import CudaDeviceMixin
from sglang.srt.platforms.device_mixin import DeviceCapability, DeviceMixin, PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from ..device import Device, Vendor, known_vendors
from . import custom_operators


def record(server_args: Any) -> Any:
    """SGLang's ServerArgs behind what ``apply_server_args_defaults`` gets."""
    from sglang.srt.arg_groups.overrides import record_of

    return record_of(server_args._cfg)


class OutOfTree(SRTPlatform):
    """The answers to SGLang for every such device, from the table of vendors; a package's declaration is a row of it."""

    _enum = PlatformEnum.OOT
    device: Device

    @property
    def vendor(self) -> Vendor:
        return known_vendors()[self.device.vendor]

    @cached_property  # SGLang reads it in every step
    def capabilities(self) -> PlatformCapabilities:
        return PlatformCapabilities(**dict.fromkeys(self.vendor.capabilities, True))

    def post_load_model(self, model: torch.nn.Module) -> None:
        super().post_load_model(model)
        if self.device_type == "cuda":
            custom_operators.register_for(self.device_type)

    def get_device(self, device_id: int | None = 0) -> str:
        # A string: SGLang splits it at ":". It asks with None as well.
        return self.device_type if device_id is None else f"{self.device_type}:{device_id}"

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        return torch.device(self.device_type, local_rank)

    def get_default_attention_backend(self) -> str:
        return self.vendor.attention or "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return self.vendor.compile_backend

    def get_torch_distributed_backend_str(self) -> str:
        # What the user asks for goes before this, in PlatformHooks.
        return self.vendor.collective

    def get_torch_profiler_activity_str(self) -> str:
        return "CUDA" if self.device_type == "cuda" else "PrivateUse1"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return getattr(torch.profiler.ProfilerActivity, self.get_torch_profiler_activity_str())


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


class OutOfTreeDevice(OutOfTree, TorchDeviceMixin):
    """A device type of its own, such as ``mlu``."""


class OutOfTreeCuda(OutOfTree, CudaDeviceMixin):
    """A chip that answers to ``torch.cuda`` and is not NVIDIA's."""

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Without ``piecewise_graph`` no prefill graphs, unless the user asks for them: SGLang itself does not look."""
        from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

        super().apply_server_args_defaults(server_args)
        if not self.capabilities.piecewise_graph and (Phase.PREFILL, "backend") not in record(server_args)._cuda_graph_config_locked:
            server_args.cuda_graph_config = with_phase(server_args.cuda_graph_config, Phase.PREFILL, backend=Backend.DISABLED)

    def get_graph_runner_cls(self) -> type | None:
        """SGLang's runner of decode graphs on CUDA. SGLang captures prefill graphs by itself wherever PyTorch is built for CUDA."""
        if not self.capabilities.graph_capture:
            return None
        from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

        return DecodeCudaGraphRunner
