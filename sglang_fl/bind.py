# SPDX-License-Identifier: Apache-2.0
"""Layer 2's one moment: a model was loaded, and its layers are bound."""

import logging

import torch

from .compat import check_layers
from .device import Device
from .dispatch.bridge.binder import Binder
from .dispatch.bridge.report import BindReport
from .dispatch.manager import get_default_manager
from .runtime import settings_in_worker

logger = logging.getLogger("sglang_fl")

_binder: Binder | None = None


def bind_model(model: torch.nn.Module, device: Device) -> BindReport:
    """Bind a model's layers, and say in the log what was bound.

    Raises:
        IncompatibleSGLang: SGLang's layers are not the ones the bridges are for.
        RuntimeError: under ``strict``, an implementation failed its trial.
    """
    global _binder
    from sglang.srt.runtime_context import get_exec

    check_layers()
    settings = settings_in_worker(device)
    if _binder is None:
        deterministic = bool(get_exec().deterministic.enable_deterministic_inference)
        _binder = Binder(get_default_manager(), settings, deterministic=deterministic)
    report = _binder.bind(model)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    logger.log(logging.DEBUG if distributed and torch.distributed.get_rank() else logging.INFO, report.summary())
    return report
