# SPDX-License-Identifier: Apache-2.0
"""PlainCpu: a CPU with PyTorch and nothing else, and the arguments that SGLang's defaults would get wrong there."""

import os
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin

from .. import compat
from . import cpu_limits
from .out_of_tree import OutOfTree, record

_USUAL_TOKENS = 32768
_BIND, _BOUND_BY_US = "SGLANG_CPU_OMP_THREADS_BIND", "_SGLANG_FL_CPU_OMP_THREADS_BIND"


class PlainCpu(OutOfTree, CpuDeviceMixin):
    """SGLang's own CPU engine needs AMX kernels built for it."""

    def get_device(self, device_id: int | None = 0) -> str:
        return "cpu"

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        super().apply_server_args_defaults(server_args)
        if compat.argument_problems():  # what the user gave cannot be told from SGLang's defaults
            return
        if self.device.vendor == "cpu":
            _refuse_what_cannot_be_served(server_args)
        # SGLang prefers its AMX backend on every x86 machine; this platform is for those without.
        if _given(server_args, "attention_backend") is None:
            server_args.attention_backend = self.get_default_attention_backend()
        server_args.disable_custom_all_reduce = True  # it is a CUDA kernel; SGLang would try and complain
        _limit_kv_cache(server_args)
        _share_cores(server_args)


def _refuse_what_cannot_be_served(server_args: Any) -> None:
    """Raises ValueError with all that a plain CPU cannot serve."""
    found = list(cpu_limits.problems(partial(_given, server_args), _model_config(server_args)))
    if found:
        raise ValueError("\n".join(["a plain CPU cannot serve (docs/support.md has the list):", *(f"  - {problem}" for problem in found)]))
    cpu_limits.refuse_requests()


def _given(server_args: Any, name: str) -> Any:
    """What the user gave for an argument, None if nothing: SGLang has filled some in by now."""
    return record(server_args)._raw_input.get(name)


def _model_config(server_args: Any) -> Any:
    from sglang.srt.arg_groups.overrides import model_config_of

    return model_config_of(record(server_args))


def _limit_kv_cache(server_args: Any) -> None:
    """Enough KV cache for the model's whole context, or for a few requests of a usual length.

    SGLang gives it most of a device's memory. A CPU's memory is also everyone else's, and zeroing
    most of it takes half a minute.
    """
    if _given(server_args, "max_total_tokens") is None and _given(server_args, "mem_fraction_static") is None:
        server_args.max_total_tokens = max(_model_config(server_args).context_len, _USUAL_TOKENS)


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
