# SPDX-License-Identifier: Apache-2.0
"""The one moment of Layers 1 and 2: a model was loaded; its layers and functions are bound, then ATen operators replaced."""

import logging

import torch

from .aten import replace_operators
from .compat import IncompatibleSGLang, layer_problems, leave_everything_message, stop_message
from .config import Settings
from .device import Device
from .dispatch.bridge.binder import Binder
from .dispatch.bridge.report import BindReport
from .dispatch.logger_manager import dispatch_log
from .dispatch.manager import get_default_manager
from .startup import settings_in_worker

logger = logging.getLogger("sglang_fl")

_binder: Binder | None = None


def bind_model(model: torch.nn.Module, device: Device) -> BindReport:
    """Bind a model's layers and functions, give ATen operators to FlagGems, and log what was done.

    Raises:
        IncompatibleSGLang: under ``strict``, SGLang's layers are not the ones the bridges are for. Otherwise they are left to it.
        RuntimeError: under ``strict``, an implementation failed its trial, or FlagGems cannot be used.
    """
    settings = settings_in_worker(device)
    level = _log_level()
    problems = layer_problems()
    if problems:
        return _leave_everything(settings, problems, level)
    from sglang.srt.runtime_context import get_exec

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
    logger.log(level, replace_operators(settings, device, deterministic=deterministic).summary())
    return report


def _process_binder() -> Binder:
    global _binder
    manager = get_default_manager()
    if _binder is None or _binder.manager is not manager:
        _binder = Binder(manager)
    return _binder


def _leave_everything(settings: Settings, problems: tuple[str, ...], level: int) -> BindReport:
    if settings.strict:
        raise IncompatibleSGLang(stop_message(problems))
    logger.log(logging.WARNING if level == logging.INFO else level, leave_everything_message(problems))
    return BindReport()


def _log_level() -> int:
    """INFO on the first rank, DEBUG on the others, so that a line is logged once."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return logging.DEBUG if distributed and torch.distributed.get_rank() else logging.INFO
