# SPDX-License-Identifier: Apache-2.0
"""PlatformHooks: what SGLang calls on its platform while a server starts, and what sglang-fl does there."""

import logging
import os
from typing import Any

import torch

from .. import compat
from ..device import Device
from .changes import log_changes

logger = logging.getLogger("sglang_fl")


class PlatformHooks:
    """Goes before every other class of a platform: each hook calls theirs too."""

    device: Device

    def device_count(self) -> int:
        """How many devices PyTorch sees; 1 for a CPU."""
        return int(torch.get_device_module(self.device.device_type).device_count())

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """While arguments resolve, in the main process: check the settings and SGLang.

        An exception here ends the server, or reaches the caller of ``sgl.Engine``.

        Raises:
            SettingsError: a setting cannot be used.
            IncompatibleSGLang: under ``strict``, this SGLang differs from what sglang-fl relies on.
        """
        from ..startup import resolve

        settings = resolve(self.device)
        log_changes(settings.patches)
        problems = compat.binding_problems()
        if settings.strict:
            compat.refuse(problems)
        if problems:
            from ..dispatch.kernel_implementations import replaceable
            from ..dispatch.manager import get_default_manager

            os.environ[compat.LEFT_TO_SGLANG] = "1"
            kernels = replaceable(get_default_manager().registry, settings, self.device)
            logger.warning(compat.leave_everything_message(problems, (target.partition(":")[2] for target in kernels)))
        elif warning := compat.version_warning():
            logger.warning("%s; all interfaces that sglang-fl needs are there, so it is active", warning)
        super().apply_server_args_defaults(server_args)  # type: ignore[misc]
        if self.is_out_of_tree() and not self.support_mamba_cache_extra_buffer():  # type: ignore[attr-defined]
            from .hybrids import leave_out_snapshots

            leave_out_snapshots(server_args)
        if problems:
            return
        from ..bind import bind_kernels

        for destination, kernels in bind_kernels(self.device).items():
            logger.info("sglang-fl: kernels of SGLang's that run on %s: %s", destination, ", ".join(kernels))

    def post_load_model(self, model: torch.nn.Module) -> None:
        """In every process that runs a model, once its weights are there: bind its layers."""
        super().post_load_model(model)  # type: ignore[misc]
        if compat.binding_problems():
            logger.info("sglang-fl binds nothing: SGLang differs from what it needs (see the warning at the server's start)")
            return
        # The bridges import SGLang's layers, which the check above has seen.
        from ..bind import bind_model

        bind_model(model, self.device)

    def get_torch_distributed_backend_str(self) -> str:
        """The backend of SGLang's device groups; where FlagCX is chosen, it is set up here, in a worker."""
        from ..startup import settings_in_worker

        settings = settings_in_worker(self.device)
        native = str(super().get_torch_distributed_backend_str())  # type: ignore[misc]
        if settings.collective is None or compat.binding_problems():
            return native
        if settings.collective == "flagcx":
            from ..distributed import set_up_flagcx

            return set_up_flagcx(settings, self.device.device_type, native)
        return settings.collective
