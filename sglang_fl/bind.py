# SPDX-License-Identifier: Apache-2.0
"""The one moment of Layers 1 and 2: a model was loaded; its layers and functions are bound, then ATen operators replaced."""

import logging
from typing import Any

import torch

from .aten import replace_operators
from .device import Device
from .dispatch.bridge.binder import Binder
from .dispatch.bridge.report import BindReport
from .dispatch.logger_manager import dispatch_log
from .dispatch.manager import get_default_manager
from .fingerprint.announce import announce
from .startup import settings_in_worker

logger = logging.getLogger("sglang_fl")

_binder: Binder | None = None


def bind_model(model: torch.nn.Module, device: Device) -> BindReport:
    """Bind a model's layers and functions, give ATen operators to FlagGems, and log what was done.

    Raises:
        RuntimeError: under ``strict``, an implementation failed its trial, or FlagGems cannot be used.
    """
    from sglang.srt.runtime_context import get_exec

    settings, level = settings_in_worker(device), _log_level()
    execution = get_exec()
    deterministic = bool(execution.deterministic.enable_deterministic_inference)
    dispatch_log().begin(type(model).__name__)
    report = _process_binder().bind(model, settings, deterministic=deterministic, log_level=level)
    logger.log(level, report.summary())
    if report.bound and execution.graph.enable_torch_compile:
        logger.log(
            level,
            "sglang-fl: with --enable-torch-compile SGLang compiles its own plain-PyTorch forward of each layer into the graphs of "
            "small batches (--torch-compile-max-bs); bound layers serve elsewhere",
        )
    captures_graphs = _captures_graphs(execution)
    operators = replace_operators(settings, device, deterministic=deterministic, captures_graphs=captures_graphs)
    logger.log(level, operators.summary())
    announce(type(model).__name__, settings, device, report, operators, level)
    return report


def _process_binder() -> Binder:
    global _binder
    manager = get_default_manager()
    if _binder is None or _binder.manager is not manager:
        _binder = Binder(manager)
    return _binder


def _captures_graphs(execution: Any) -> bool:
    """Whether SGLang will capture graphs of the model, in decode or in prefill."""
    config = getattr(execution.graph, "cuda_graph_config", None)
    return config is not None and any(phase.backend != "disabled" for phase in (config.decode, config.prefill))


def _log_level() -> int:
    """INFO on the first rank, DEBUG on the others, so that a line is logged once."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return logging.DEBUG if distributed and torch.distributed.get_rank() else logging.INFO
