# SPDX-License-Identifier: Apache-2.0
"""Layers 1 and 2, when a model was loaded: replace ATen operators, then bind the model's layers and functions.

In this order, since an implementation is tried under the conditions that it serves in. What ended an earlier start on any rank is left out.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from .aten import in_force, replace_operators, restore_operators
from .aten.agreement import agree
from .config import Settings
from .device import Device
from .dispatch.bridge.binder import Binder
from .dispatch.bridge.report import BindReport
from .dispatch.bridge.socket import Load
from .dispatch.logger_manager import dispatch_log
from .dispatch.manager import get_default_manager
from .distributed.ranks import Ranks, tensor_parallel_ranks
from .fingerprint.announce import announce, server_facts
from .fingerprint.measured import chip_name, conditions_of, warn_of_changes
from .startup import settings_in_worker
from .trial import TO_TRY_AGAIN, open_guard

logger = logging.getLogger("sglang_fl")

_binder: Binder | None = None
#: What the log said last of what holds for all models of a process, a draft too.
_told: dict[str, str] = {}
#: A model's name, see _name_of -> what says anew what it runs on.
_announcements: dict[str, Callable[[], object]] = {}


def bind_model(model: torch.nn.Module, device: Device) -> BindReport:
    """Give ATen operators to FlagGems, bind a model's layers and functions, and log what was done.

    Raises:
        RuntimeError: under ``strict``, an implementation or a function failed its trial or ended an earlier start, or FlagGems
            cannot be used.
    """
    from sglang.srt.runtime_context import get_disagg, get_exec

    settings, level = settings_in_worker(device), _log_level()
    execution = get_exec()
    deterministic = bool(execution.deterministic.enable_deterministic_inference)
    # A prefill server that may become a decode server captures decode graphs then.
    captures_graphs = _captures(execution, "decode", "prefill") or bool(get_disagg().enable_pd_role_switch)
    if getattr(execution.graph, "debug_cuda_graph", False):  # each graph is empty, and the model runs eagerly at each replay
        captures_graphs = False
    name = _name_of(model)
    dispatch_log().begin(name)
    ranks = tensor_parallel_ranks()
    excluded = _excluded(settings, device, ranks)
    replaced = replace_operators(
        settings, device, deterministic=deterministic, captures_graphs=captures_graphs, ranks=ranks, excluded=excluded
    )
    operators = in_force()
    kernels = bind_kernels(device, deterministic=deterministic)
    load = Load(settings, deterministic, level, operators, _in_graphs(captures_graphs), excluded)
    try:
        report = process_binder().bind(model, load, ranks.exchange)
        if operators is not None:  # functions whose first calls were in these trials
            agree(operators, ranks)
            replaced = operators.report
    except BaseException:
        restore_operators()
        raise
    logger.log(level, report.summary())
    if report.bound and execution.graph.enable_torch_compile and _captures(execution, "decode"):
        _tell(
            level,
            "compiles",
            "sglang-fl: with --enable-torch-compile SGLang compiles its own plain-PyTorch forward of each layer into the graphs of "
            "small batches (--torch-compile-max-bs); bound layers run in all other batches",
        )
    _tell(level, "replaced", replaced.summary())
    announce(server_facts(name, settings, device, report, replaced, kernels, excluded), level)
    if operators is not None:  # a capture, or a first pass, may give functions back to PyTorch
        _announcements[name] = lambda: announce(server_facts(name, settings, device, report, operators.report, kernels, excluded), level)
        operators.changed = _announce_again
    if level == logging.INFO:  # on one rank
        warn_of_changes(settings, lambda: conditions_of(getattr(model, "config", None), chip_name(device), ranks.count))
    return report


def _name_of(model: torch.nn.Module) -> str:
    """Its class, and whether it is a draft model: that may be of its target's class."""
    from sglang.srt.runtime_context import get_flags

    # It is among SGLang's flags of experts, and set while any draft model is loaded.
    is_draft = getattr(get_flags().moe, "in_speculative_scope", False)
    return f"{type(model).__name__} (draft)" if is_draft else type(model).__name__


def _tell(level: int, what: str, line: str) -> None:
    if _told.get(what) != line:
        _told[what] = line
        logger.log(level, line)


def _announce_again() -> None:
    for announcement in _announcements.values():
        announcement()


def bind_kernels(device: Device, *, deterministic: bool = False) -> dict[str, list[str]]:
    """Bind the kernels that SGLang calls outside of its layers, before the first of them can run in this process.

    Returns:
        Implementation -> the kernels that run on it.

    Raises:
        RuntimeError: under ``strict``, none that the policy wants can run.
    """
    return process_binder().bind_kernels(Load(settings_in_worker(device), deterministic), device)


def _excluded(settings: Settings, device: Device, ranks: Ranks) -> dict[str, str]:
    """What ended an earlier start, on any rank's host: name -> what happened. Under ``strict``, what would use it raises."""
    guard = open_guard(settings, f"{device.vendor} {chip_name(device)}")
    excluded: dict[str, str] = {}
    for found in ranks.exchange(dict(guard.excluded)):
        excluded |= found
    if not excluded:
        return excluded
    listed = "; ".join(f"{name} ({reason})" for name, reason in sorted(excluded.items()))
    logger.log(
        ranks.level(logging.WARNING),
        "sglang-fl: excluded, since an earlier start crashed or hung in its first run: %s. %s",
        listed,
        TO_TRY_AGAIN,
    )
    return excluded


def _in_graphs(captures_graphs: bool) -> Any:
    operators = in_force()
    if not captures_graphs:
        return None
    return nullcontext if operators is None else operators.watched


def process_binder() -> Binder:
    """The one of this process."""
    global _binder
    manager = get_default_manager()
    if _binder is None or _binder.manager is not manager:
        _binder = Binder(manager)
    return _binder


def _captures(execution: Any, *phases: str) -> bool:
    """Whether SGLang will capture graphs of the model in one of these phases, ``decode`` and ``prefill``."""
    config = getattr(execution.graph, "cuda_graph_config", None)
    return config is not None and any(getattr(config, phase).backend != "disabled" for phase in phases)


def _log_level() -> int:
    """INFO on the first rank, DEBUG on the others, so that a line is logged once."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return logging.DEBUG if distributed and torch.distributed.get_rank() else logging.INFO
