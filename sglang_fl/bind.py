# SPDX-License-Identifier: Apache-2.0
"""The one moment of Layers 1 and 2: a model was loaded; its layers and functions are bound, then ATen operators replaced."""

import logging

import torch

from .aten import replace_operators
from .compat import check_layers
from .device import Device
from .dispatch.bridge.binder import Binder
from .dispatch.bridge.function import FunctionBinder
from .dispatch.bridge.gated_delta_rule import GATED_DELTA_RULE
from .dispatch.bridge.report import BindReport
from .dispatch.logger_manager import dispatch_log
from .dispatch.manager import get_default_manager
from .startup import settings_in_worker

logger = logging.getLogger("sglang_fl")

_binder: Binder | None = None
_functions: FunctionBinder | None = None


def bind_model(model: torch.nn.Module, device: Device) -> BindReport:
    """Bind a model's layers, give ATen operators to FlagGems, and say in the log what was done.

    Raises:
        IncompatibleSGLang: SGLang's layers are not the ones the bridges are for.
        RuntimeError: under ``strict``, an implementation failed its trial, or FlagGems cannot be used.
    """
    global _binder, _functions
    from sglang.srt.runtime_context import get_exec

    check_layers()
    settings = settings_in_worker(device)
    execution = get_exec()
    deterministic = bool(execution.deterministic.enable_deterministic_inference)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    level = logging.DEBUG if distributed and torch.distributed.get_rank() else logging.INFO
    if _binder is None or _functions is None:
        _binder = Binder(get_default_manager(), settings, deterministic=deterministic, log_level=level)
        _functions = FunctionBinder(GATED_DELTA_RULE, get_default_manager(), settings, deterministic=deterministic, log_level=level)
    dispatch_log().begin(type(model).__name__)
    report = _binder.bind(model)
    _functions.bind(model, report)
    logger.log(level, report.summary())
    if report.bound and execution.graph.enable_torch_compile:
        logger.log(
            level,
            "sglang-fl: with --enable-torch-compile SGLang compiles its own plain-PyTorch forward of each layer into the graphs of "
            "small batches (--torch-compile-max-bs); bound layers serve elsewhere",
        )
    logger.log(level, replace_operators(settings, device, deterministic=deterministic).summary())
    return report
