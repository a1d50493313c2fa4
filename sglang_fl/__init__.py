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
    SGLang's own platform: this SGLang has another platform interface, and a warning says what differs.
    """
    try:
        from .platform import PlatformFL  # noqa: F401
    except (ImportError, AttributeError) as error:
        _leave_device_to_sglang(error)
        return None
    return "sglang_fl.platform:PlatformFL"


def load_plugin() -> None:
    """Entry point ``sglang.srt.plugins``: sets the level of sglang-fl's loggers, before SGLang reads its arguments.

    The attention backends of a chip that a package brings up become values of ``--attention-backend`` and
    of ``--speculative-draft-attention-backend``, of which SGLang asks the platform.
    """
    level = os.environ.get("SGLANG_FL_LOG_LEVEL", "").strip().upper()
    if level in logging.getLevelNamesMapping():
        logging.getLogger("sglang_fl").setLevel(level)

    from .device import platform_here

    found = platform_here(os.environ)
    if found is not None:
        from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, DRAFT_ATTENTION_BACKEND_CHOICES

        for choices in (ATTENTION_BACKEND_CHOICES, DRAFT_ATTENTION_BACKEND_CHOICES):
            choices.extend(name for name in found[0].attention_backends if name not in choices)


def _leave_device_to_sglang(error: Exception) -> None:
    """Say why; under ``strict``, end the process, since SGLang would go on whatever was raised."""
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
