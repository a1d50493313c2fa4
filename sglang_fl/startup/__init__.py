# SPDX-License-Identifier: Apache-2.0
"""The settings of this process: resolved once in the server's main process, handed to its workers.

The main process puts what it resolved into the environment that its workers inherit, so that a file
edited while a server starts cannot give its ranks different settings.
"""

import logging
import os
from collections.abc import Mapping, Sequence

from ..config import Settings, SettingsError, hand_down, load_settings, plugin_modules, settings_of_parent
from ..device import Device
from ..device.declared import platform_problems
from ..dispatch.logger_manager import open_dispatch_log, why_unwritable
from ..dispatch.manager import OpManager, get_default_manager
from ..dispatch.policy import PolicyManager
from ..distributed.device_communicators.flagcx_files import FlagCXError, find_library
from .words import vocabulary

_current: Settings | None = None


def check_settings(environ: Mapping[str, str], device: Device, manager: OpManager) -> Settings:
    """Read the settings and check all of them, names and what installed packages bring included.

    Raises:
        SettingsError: with every problem that was found.
    """
    modules = plugin_modules(environ)
    discovery = manager.discover(modules)
    broken = [failure for failure in discovery.failed if failure.module is not None]
    problems = [f"SGLANG_FL_PLUGIN_MODULES: {failure.module} cannot be used: {failure.reason}" for failure in broken]
    return _checked(environ, device, manager, [*problems, *discovery.conflicts])


def check_names(environ: Mapping[str, str], device: Device, manager: OpManager) -> Settings:
    """As :func:`check_settings`, but for backends: packages are imported only if a name is not known without them."""
    modules = plugin_modules(environ)
    if modules:
        return check_settings(environ, device, manager)
    return _checked(environ, device, manager, [])


def _checked(environ: Mapping[str, str], device: Device, manager: OpManager, more: Sequence[str]) -> Settings:
    problems = [*more, *platform_problems(environ)]
    try:
        settings = load_settings(environ, device=device, vocabulary=vocabulary(manager))
    except SettingsError as error:
        raise SettingsError([*error.problems, *problems]) from None
    for variable, path in (("SGLANG_FL_DISPATCH_LOG", settings.dispatch_log), ("SGLANG_FLAGGEMS_LOG_PATH", settings.flaggems_log_path)):
        unwritable = why_unwritable(path)
        if unwritable:
            problems.append(f"{variable}: {unwritable}")
    if settings.collective == "flagcx":
        source = settings.source("flagcx_path" if settings.flagcx_path else "dist_backend")
        try:
            find_library(settings.flagcx_path, environ)
        except FlagCXError as error:
            problems.append(f"{source}: {error}")
    if problems:
        raise SettingsError(problems)
    return settings


def resolve(device: Device) -> Settings:
    """Read, check and put in force the settings of a server that starts in this process.

    Raises:
        SettingsError: with every problem that was found.
    """
    settings = check_settings(os.environ, device, get_default_manager())
    hand_down(settings, os.environ)
    apply(settings)
    return settings


def settings_in_worker(device: Device) -> Settings:
    """The settings in a process that runs the model; put in force there on the first call."""
    if _current is None:
        inherited = settings_of_parent()
        if inherited is None:
            return resolve(device)
        get_default_manager().ensure_initialized(inherited.plugin_modules or ())
        apply(inherited)
        return inherited
    return _current


def apply(settings: Settings) -> None:
    """Put settings in force in this process."""
    global _current
    _current = settings
    logging.getLogger("sglang_fl").setLevel("DEBUG" if settings.dispatch_debug else settings.log_level)
    open_dispatch_log(settings.dispatch_log)
    PolicyManager.get_instance().use_settings(settings)
