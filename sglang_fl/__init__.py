# SPDX-License-Identifier: Apache-2.0
"""sglang-fl: SGLang on any AI chip with FlagOS.

SGLang finds this package through two entry points and calls the two functions below in each of its
processes. Both run where SGLang swallows exceptions, so they do nothing that can fail; settings are
read and checked in ``PlatformFL.apply_server_args_defaults``.
"""

import logging
import os
import sys

__version__ = "0.1.0"


def activate_platform() -> str | None:
    """Entry point ``sglang.srt.platforms``: the platform class, as ``module:name``.

    SGLang calls it in the middle of its own import and imports the class right afterwards. None leaves the device to
    SGLang's own platform: this SGLang has another platform interface; a warning says what differs.
    """
    try:
        from .platform import PlatformFL
    except (ImportError, AttributeError) as error:
        _leave_device_to_sglang(error)
        return None
    if _patches_are_off():
        from .platform.changes import leave_out_packages

        leave_out_packages()
    from .platform.absent_packages import stand_in_for_absent_packages

    stand_in_for_absent_packages(PlatformFL.device)
    return "sglang_fl.platform:PlatformFL"


def load_plugin() -> None:
    """Entry point ``sglang.srt.plugins``: sets the level of sglang-fl's loggers, before SGLang reads its arguments.

    What a package declares of the chip becomes values of ``--attention-backend``, ``--quantization`` and the like. The changes
    to SGLang in our folder of the chip's vendor, if there are any, are made.
    """
    level = os.environ.get("SGLANG_FL_LOG_LEVEL", "").strip().upper()
    if level in logging.getLevelNamesMapping():
        logging.getLogger("sglang_fl").setLevel(level)

    from .kernels.trace import start_if_asked

    start_if_asked()

    from sglang.srt.platforms import current_platform

    declaration = getattr(current_platform, "declaration", None)
    if declaration is not None:
        from .platform.declared import add_choices

        add_choices(declaration)
    device = getattr(current_platform, "device", None)
    if device is not None and not _patches_are_off():
        from .platform.changes import load_vendor_folder

        load_vendor_folder(device.vendor)
    from .compat import LEFT_TO_SGLANG
    from .config.process import settings_of_parent
    from .dispatch.kernel_implementations import may_be_replaced

    settings = settings_of_parent()  # None in the main process, which has not resolved them yet
    if device is not None and settings is not None and LEFT_TO_SGLANG not in os.environ and may_be_replaced(settings, device):
        from .bind import bind_kernels

        bind_kernels(device)


def _patches_are_off() -> bool:
    return os.environ.get("SGLANG_FL_PATCHES", "").strip().lower() in ("0", "false", "no", "off")


def _leave_device_to_sglang(error: Exception) -> None:
    """Log the reason; under ``strict``, end the process, since SGLang would ignore an exception."""
    from .compat import leave_everything_message, stop_message
    from .config import SettingsError, load_settings
    from .device import detect
    from .utils.packages import last_line

    device = detect()
    problems = [f"its platform interface: {last_line(error)}"]
    if device.in_tree is None:
        problems.append(f"SGLang itself has no platform for this device ({device.vendor}) and may stop with an error of its own")
    try:
        strict = load_settings(os.environ, device=device).strict
    except SettingsError:  # SGLang serves without them
        strict = False
    if strict:
        sys.exit(stop_message(problems))
    logging.getLogger("sglang_fl").warning(leave_everything_message(problems))
